"""Whatever is wrong with an argument is said before a kernel runs: which one, what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import kdkernels as kd
from kdkernels.backends import native

BATCH = (2, 3)
VOCAB = 7
HIDDEN = 5
NAN, INF = float("nan"), float("inf")


class NoKernels:
    """Stands in for the extension while arguments are refused."""

    def __init__(self, extension: Any) -> None:
        self.extension = extension

    def isa(self) -> str:
        return str(self.extension.isa())

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the kernel {name} was called")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.module is not None:
        monkeypatch.setattr(native, "module", NoKernels(native.module))


def logits(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*(shape or (*BATCH, VOCAB)), **options)


def head(vocab: int = VOCAB, **options: Any) -> kd.LMHead:
    return kd.LMHead(logits(*BATCH, HIDDEN, **options), logits(vocab, HIDDEN, **options))


def tokens(value: float = 1.0, **options: Any) -> torch.Tensor:
    return torch.full(BATCH, value, **options)


def one_token(value: float, others: float = 1.0, **options: Any) -> torch.Tensor:
    """Per-token values of which only the last is ``value``."""
    values = tokens(others, **options)
    values[-1, -1] = value
    return values


def call(function: Callable[..., Any], **changed: Any) -> Any:
    """Calls a public function with arguments that are all right but for those changed."""
    return function(**({"student": logits(), "teacher": logits()} | changed))


class Refusal(NamedTuple):
    """Arguments, the error they cause, and what its text must mention."""

    name: str
    arguments: dict[str, Any]
    error: type[Exception]
    mentions: tuple[str, ...]


def refusal(name: str, error: type[Exception], *mentions: str, **arguments: Any) -> Refusal:
    return Refusal(name, arguments, error, mentions)


def check(refused: Refusal, function: Callable[..., Any]) -> None:
    with pytest.raises(refused.error) as caught:
        call(function, **refused.arguments)
    missing = [text for text in refused.mentions if text not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} does not mention {missing}"


def each(cases: list[Refusal]) -> pytest.MarkDecorator:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("refused", cases, ids=names)


def bad_logits(name: str) -> list[Refusal]:
    """What is refused as student and as teacher."""
    sources = "tensor of logits, kd.Logits or kd.LMHead"
    dtypes = ("torch.float32", "torch.bfloat16", "torch.float16", "torch.float64")
    cases = {
        "list": ([1.0, 2.0], TypeError, (sources, "list")),
        "numpy": (np.zeros((2, 3, VOCAB), np.float32), TypeError, (sources, "ndarray")),
        "none": (None, TypeError, (sources, "None")),
        "class": (kd.LMHead, TypeError, (sources, "type")),
        "int64": (logits(dtype=torch.int64), TypeError, ("torch.int64", *dtypes)),
        "bool": (logits(dtype=torch.bool), TypeError, ("torch.bool", *dtypes)),
        "complex": (logits(dtype=torch.complex64), TypeError, ("torch.complex64", *dtypes)),
        "float8": (logits().to(torch.float8_e4m3fn), TypeError, ("torch.float8_e4m3fn", *dtypes)),
        "sparse": (logits().to_sparse(), TypeError, ("dense", "sparse")),
        "0d": (torch.zeros(()), ValueError, ("[..., V]", "0-d")),
        "empty-vocabulary": (logits(*BATCH, 0), ValueError, ("vocabulary", "(2, 3, 0)")),
        "empty-head": (head(0), ValueError, ("vocabulary", f"(0, {HIDDEN})")),
    }
    return [
        refusal(f"{name}-{case}", error, name, *mentions, **{name: value})
        for case, (value, error, mentions) in cases.items()
        if (name, case) != ("teacher", "none")  # token_statistics does without a teacher
    ]


def bad_temperature(name: str) -> list[Refusal]:
    cases = {
        "zero": (0.0, ValueError, ("positive", "0.0")),
        "negative": (-2, ValueError, ("positive", "-2")),
        "nan": (NAN, ValueError, ("positive", "nan")),
        "infinite": (INF, ValueError, ("finite", "inf")),
        "bool": (True, TypeError, ("number", "True")),
        "string": ("2", TypeError, ("number", "'2'")),
        "list": ([1.0] * 6, TypeError, ("number", "[1.0")),
        "numpy": (np.ones(BATCH, np.float32), TypeError, ("number", "array")),
        "tensor-zero": (one_token(0.0), ValueError, ("positive", "token", "0.0")),
        "tensor-negative": (one_token(-3.0), ValueError, ("positive", "token", "-3.0")),
        "tensor-nan": (one_token(NAN), ValueError, ("positive", "token", "nan")),
        "tensor-infinite": (one_token(INF), ValueError, ("finite", "token", "inf")),
        "tensor-shape": (torch.ones(3, 2), ValueError, ("one entry per token", "(2, 3)", "(3, 2)")),
        "tensor-flat": (torch.ones(6), ValueError, ("one entry per token", "(2, 3)", "(6,)")),
        "tensor-bool": (tokens(dtype=torch.bool), TypeError, ("real", "torch.bool")),
        "tensor-complex": (tokens(dtype=torch.complex64), TypeError, ("real", "torch.complex64")),
        "tensor-sparse": (tokens().to_sparse(), TypeError, ("dense", "sparse")),
        "tensor-device": (tokens(device="meta"), ValueError, ("meta", "cpu")),
    }
    return [
        refusal(f"{name}-{case}", error, name, *mentions, **{name: value})
        for case, (value, error, mentions) in cases.items()
    ]


# Arguments that distillation_loss and token_statistics share, in the fused functions and in the reference.
SHARED = [
    *bad_logits("student"),
    *bad_logits("teacher"),
    *bad_temperature("temperature"),
    *bad_temperature("teacher_temperature"),
    refusal("batch-shapes", ValueError, "student", "teacher", "(2, 3)", "(3, 2)", teacher=logits(3, 2, VOCAB)),
    refusal("batch-dims", ValueError, "student", "teacher", "(2, 3)", "(6,)", teacher=logits(6, VOCAB)),
    refusal("batch-broadcast", ValueError, "student", "teacher", "(1, 3)", teacher=logits(1, 3, VOCAB)),
    refusal("vocabularies", ValueError, "student", "teacher", "7 and 9", "vocab_size=7", teacher=logits(*BATCH, 9)),
    refusal("vocabularies-head", ValueError, "5 and 7", "vocab_size=5", student=head(5)),
    refusal("devices", ValueError, "student", "cpu", "teacher", "meta", teacher=logits(device="meta")),
    refusal("devices-head", ValueError, "student", "meta", "teacher", "cpu", student=head(device="meta")),
    refusal("mask-integer", TypeError, "mask", "bool", "torch.int64", mask=tokens(dtype=torch.int64)),
    refusal("mask-float", TypeError, "mask", "bool", "torch.float32", mask=tokens(1.0)),
    refusal("mask-list", TypeError, "mask", "bool", "list", mask=[True] * 6),
    refusal("mask-shape", ValueError, "mask", "(2, 3)", "(3,)", mask=torch.ones(3, dtype=torch.bool)),
    refusal("mask-device", ValueError, "mask", "meta", "cpu", mask=tokens(dtype=torch.bool, device="meta")),
    refusal("labels-float", TypeError, "labels", "integer", "torch.float32", labels=tokens(1.0)),
    refusal("labels-bool", TypeError, "labels", "integer", "torch.bool", labels=tokens(dtype=torch.bool)),
    refusal("labels-complex", TypeError, "labels", "integer", "complex128", labels=tokens(dtype=torch.complex128)),
    refusal("labels-list", TypeError, "labels", "integer", "list", labels=[1, 2, 3]),
    refusal("labels-shape", ValueError, "labels", "(2, 3)", "(2,)", labels=torch.ones(2, dtype=torch.int64)),
    refusal("labels-device", ValueError, "labels", "meta", "cpu", labels=tokens(dtype=torch.int64, device="meta")),
    refusal("labels-too-large", ValueError, "labels", "[0, 7)", "-100", "7", labels=one_token(7, dtype=torch.int64)),
    refusal("labels-negative", ValueError, "labels", "[0, 7)", "-1", labels=one_token(-1, dtype=torch.int64)),
    refusal(
        "labels-past-vocab_size", ValueError, "labels", "[0, 4)", labels=one_token(4, dtype=torch.int32), vocab_size=4
    ),
    refusal(
        "ignore_index-none", TypeError, "ignore_index", "None", labels=tokens(dtype=torch.int64), ignore_index=None
    ),
    refusal(
        "ignore_index-float", TypeError, "ignore_index", "-1.5", labels=tokens(dtype=torch.int64), ignore_index=-1.5
    ),
    refusal("vocab_size-zero", ValueError, "vocab_size", "1", "7", "0", vocab_size=0),
    refusal("vocab_size-negative", ValueError, "vocab_size", "7", "-3", vocab_size=-3),
    refusal("vocab_size-large", ValueError, "vocab_size", "student", "7", "8", vocab_size=8, teacher=logits(*BATCH, 9)),
    refusal("vocab_size-large-head", ValueError, "vocab_size", "teacher", "7", "9", vocab_size=9, student=head(9)),
    refusal("vocab_size-float", TypeError, "vocab_size", "integer", "2.5", vocab_size=2.5),
    refusal("vocab_size-bool", TypeError, "vocab_size", "integer", "True", vocab_size=True),
    refusal("vocab_size-string", TypeError, "vocab_size", "integer", "'7'", vocab_size="7"),
]

# Those of the loss alone.
LOSS = [
    refusal("teacher-none", TypeError, "teacher", "None", teacher=None),
    refusal("divergence-class", TypeError, "divergence", "JSD()", divergence=kd.JSD),
    refusal("divergence-string", TypeError, "divergence", "kd.ForwardKL()", "'jsd'", divergence="jsd"),
    refusal("divergence-none", TypeError, "divergence", "kd.ForwardKL()", "None", divergence=None),
    refusal("divergence-base", NotImplementedError, "Divergence", "formula", divergence=kd.Divergence()),
    refusal("weight-list", TypeError, "weight", "real", "list", weight=[1.0] * 6),
    refusal("weight-number", TypeError, "weight", "tensor", "float", weight=0.5),
    refusal("weight-bool", TypeError, "weight", "real", "torch.bool", weight=tokens(dtype=torch.bool)),
    refusal("weight-complex", TypeError, "weight", "real", "torch.complex64", weight=tokens(dtype=torch.complex64)),
    refusal("weight-shape", ValueError, "weight", "(2, 3)", "(2, 3, 1)", weight=torch.ones(2, 3, 1)),
    refusal("weight-device", ValueError, "weight", "meta", "cpu", weight=tokens(device="meta")),
    refusal("ce_weight-without-labels", ValueError, "ce_weight", "0.5", "labels", ce_weight=0.5),
    refusal("ce_weight-nan", ValueError, "ce_weight", "finite", "nan", ce_weight=NAN),
    refusal("ce_weight-infinite", ValueError, "ce_weight", "finite", "inf", ce_weight=INF),
    refusal("ce_weight-none", TypeError, "ce_weight", "number", "None", ce_weight=None),
    refusal("ce_weight-string", TypeError, "ce_weight", "number", "'1'", ce_weight="1"),
    refusal("ce_weight-tensor-without-labels", ValueError, "ce_weight", "labels", ce_weight=torch.tensor(0.5)),
    refusal(
        "ce_weight-tensor-shape",
        ValueError,
        "ce_weight",
        "(6,)",
        ce_weight=torch.ones(6),
        labels=tokens(dtype=torch.int64),
    ),
    refusal("reduction-unknown", ValueError, "reduction", "none, sum, mean", "'avg'", reduction="avg"),
    refusal("reduction-none", ValueError, "reduction", "none, sum, mean", "None", reduction=None),
    refusal("reduction-list", ValueError, "reduction", "none, sum, mean", "['sum']", reduction=["sum"]),
    refusal("normalizer-with-sum", ValueError, "normalizer", "'mean'", "'sum'", normalizer=3.0, reduction="sum"),
    refusal("normalizer-with-none", ValueError, "normalizer", "'mean'", "'none'", normalizer=3.0, reduction="none"),
    refusal("normalizer-zero", ValueError, "normalizer", "positive", "0", normalizer=0),
    refusal("normalizer-negative", ValueError, "normalizer", "positive", "-1.0", normalizer=-1.0),
    refusal("normalizer-nan", ValueError, "normalizer", "positive", "nan", normalizer=NAN),
    refusal("normalizer-infinite", ValueError, "normalizer", "finite", "inf", normalizer=INF),
    refusal("normalizer-bool", TypeError, "normalizer", "number", "True", normalizer=True),
    refusal("normalizer-string", TypeError, "normalizer", "number", "'3'", normalizer="3"),
    refusal("normalizer-tensor-zero", ValueError, "normalizer", "positive", "0", normalizer=torch.tensor(0)),
    refusal("normalizer-tensor-nan", ValueError, "normalizer", "positive", "nan", normalizer=torch.tensor(NAN)),
    refusal("normalizer-tensor-shape", TypeError, "normalizer", "0-d", "(2, 3)", normalizer=tokens()),
    refusal("normalizer-tensor-bool", TypeError, "normalizer", "real", "torch.bool", normalizer=torch.tensor(True)),
    refusal("normalizer-device", ValueError, "normalizer", "meta", "cpu", normalizer=torch.tensor(3.0, device="meta")),
    refusal(
        "temperature_squared-number", TypeError, "temperature_squared", "True or False", "4.0", temperature_squared=4.0
    ),
    refusal("temperature_squared-none", TypeError, "temperature_squared", "True or False", temperature_squared=None),
]

# Those that the reference does not have.
FUSED = [
    refusal("memory_budget-negative", ValueError, "memory_budget", "0 or more", "-5", memory_budget=-5),
    refusal("memory_budget-float", TypeError, "memory_budget", "integer", "1.5", memory_budget=1.5),
    refusal("memory_budget-string", TypeError, "memory_budget", "integer", "'1GB'", memory_budget="1GB"),
    refusal("memory_budget-bool", TypeError, "memory_budget", "integer", "True", memory_budget=True),
    refusal("backend-unknown", ValueError, "backend", "reference, cpu, triton", "'gpu'", backend="gpu"),
    refusal("backend-number", TypeError, "backend", "reference, cpu, triton", "3", backend=3),
    refusal("backend-list", TypeError, "backend", "reference, cpu, triton", "['cpu']", backend=["cpu"]),
]

FUSED_LOSS = [
    refusal("vocabulary_order-list", TypeError, "vocabulary_order", "integer tensor", "list", vocabulary_order=[0, 1]),
    refusal("vocabulary_order-shape", TypeError, "vocabulary_order", "shape", "(3,)", vocabulary_order=torch.arange(3)),
    refusal(
        "vocabulary_order-twice",
        ValueError,
        "vocabulary_order",
        "each id",
        "once",
        vocabulary_order=torch.zeros(VOCAB, dtype=torch.int64),
    ),
    refusal("gradient_tolerance", ValueError, "gradient_tolerance", "less than 1", "-0.001", gradient_tolerance=-1e-3),
    refusal("gradient_tolerance-string", TypeError, "gradient_tolerance", "number", gradient_tolerance="0.1"),
    refusal("gradient_tolerance-nan", ValueError, "gradient_tolerance", "finite", gradient_tolerance=NAN),
    refusal("process_group", NotImplementedError, "process_group", "None", process_group=object()),
    refusal(
        "temperature-requires-grad",
        NotImplementedError,
        "temperature",
        "requires grad",
        "backend='reference'",
        temperature=tokens().requires_grad_(),
    ),
    refusal(
        "teacher_temperature-requires-grad",
        NotImplementedError,
        "teacher_temperature",
        "requires grad",
        "backend='reference'",
        teacher_temperature=tokens().requires_grad_(),
    ),
]

each_loss = pytest.mark.parametrize(
    "function", [kd.distillation_loss, kd.reference.distillation_loss], ids=["fused", "reference"]
)


@pytest.mark.usefixtures("no_kernels")
@each_loss
@each(SHARED + LOSS)
def test_loss_refuses(refused: Refusal, function: Callable[..., Any]) -> None:
    check(refused, function)


@pytest.mark.usefixtures("no_kernels")
@each(FUSED + FUSED_LOSS)
def test_fused_loss_refuses(refused: Refusal) -> None:
    check(refused, kd.distillation_loss)


@pytest.mark.usefixtures("no_kernels")
@each(SHARED + FUSED)
def test_statistics_refuse(refused: Refusal) -> None:
    check(refused, kd.token_statistics)


@pytest.mark.usefixtures("no_kernels")
@each(SHARED)
def test_reference_statistics_refuse(refused: Refusal) -> None:
    check(refused, kd.reference.token_statistics)


@pytest.mark.usefixtures("no_kernels")
def test_backend_refuses_the_device_of_the_tensors() -> None:
    check(
        refusal("", ValueError, "backend='cpu'", "meta", student=logits(device="meta"), teacher=logits(device="meta")),
        lambda **arguments: kd.distillation_loss(**arguments, backend="cpu"),
    )


def number_parameters(
    name: str, make: Callable[[Any], Any], *, tensors: bool = False
) -> list[tuple[str, Callable[[], Any], type, tuple[str, ...]]]:
    """What no parameter of a divergence may be."""
    values = {
        "nan": (NAN, ValueError),
        "infinite": (INF, ValueError),
        "string": ("0.5", TypeError),
        "bool": (True, TypeError),
        "none": (None, TypeError),
    }
    if not tensors:
        values["tensor"] = (torch.tensor(0.5), TypeError)
    return [
        (f"{name}-{case}", lambda value=value: make(value), error, ("finite number", repr(value)))
        for case, (value, error) in values.items()
    ]


BAD_DIVERGENCES = [
    *number_parameters("Jeffreys: weight", kd.Jeffreys, tensors=True),
    *number_parameters("JSD: beta", kd.JSD, tensors=True),
    *number_parameters("SkewForwardKL: alpha", kd.SkewForwardKL, tensors=True),
    *number_parameters("SkewReverseKL: alpha", kd.SkewReverseKL, tensors=True),
    *number_parameters("AlphaDivergence: alpha", kd.AlphaDivergence),
    *number_parameters("Renyi: alpha", kd.Renyi),
    *number_parameters("ABDivergence: alpha", lambda value: kd.ABDivergence(value, 0.5)),
    *number_parameters("ABDivergence: beta", lambda value: kd.ABDivergence(0.5, value)),
    ("JSD: beta-0", lambda: kd.JSD(0), ValueError, ("between 0 and 1", "ForwardKL()", "0.0")),
    ("JSD: beta-1", lambda: kd.JSD(1), ValueError, ("between 0 and 1", "ReverseKL()", "1.0")),
    ("JSD: beta-negative", lambda: kd.JSD(-0.1), ValueError, ("between 0 and 1", "-0.1")),
    ("JSD: beta-above", lambda: kd.JSD(1.5), ValueError, ("between 0 and 1", "1.5")),
    ("Jeffreys: weight-above", lambda: kd.Jeffreys(1.01), ValueError, ("between 0 and 1", "1.01")),
    ("Jeffreys: weight-negative", lambda: kd.Jeffreys(-1), ValueError, ("between 0 and 1", "-1")),
    ("SkewForwardKL: alpha-1", lambda: kd.SkewForwardKL(1), ValueError, ("less than 1", "1.0")),
    ("SkewReverseKL: alpha-negative", lambda: kd.SkewReverseKL(-0.5), ValueError, ("at least 0", "-0.5")),
    ("Renyi: alpha-zero", lambda: kd.Renyi(0), ValueError, ("greater than 0", "0.0")),
    ("ABDivergence: alpha-zero", lambda: kd.ABDivergence(0, 0.5), ValueError, ("greater than 0", "0.0")),
    ("ABDivergence: beta-limit", lambda: kd.ABDivergence(1, 0), ValueError, ("greater than 0", "ForwardKL()")),
    ("ABDivergence: alpha-limit", lambda: kd.ABDivergence(0, 1), ValueError, ("greater than 0", "ReverseKL()")),
]

HEAD = {"hidden": logits(*BATCH, HIDDEN), "weight": logits(VOCAB, HIDDEN)}

BAD_HEADS = [
    refusal("hidden-list", TypeError, "hidden", "torch.Tensor", "list", hidden=[1.0]),
    refusal("hidden-numpy", TypeError, "hidden", "torch.Tensor", "ndarray", hidden=np.zeros(HIDDEN)),
    refusal("hidden-integer", TypeError, "hidden", "torch.int64", hidden=logits(*BATCH, HIDDEN, dtype=torch.int64)),
    refusal("hidden-sparse", TypeError, "hidden", "dense", "sparse", hidden=logits(6, HIDDEN).to_sparse()),
    refusal("hidden-0d", ValueError, "hidden", "[..., H]", "0-d", hidden=torch.zeros(())),
    refusal("hidden-size", ValueError, "hidden", "weight", "4", "(7, 5)", hidden=logits(*BATCH, 4)),
    refusal("weight-none", TypeError, "weight", "torch.Tensor", "NoneType", weight=None),
    refusal("weight-transposed", ValueError, "hidden", "weight", "(5, 7)", weight=logits(HIDDEN, VOCAB)),
    refusal("weight-3d", ValueError, "weight", "[V, H]", "(1, 7, 5)", weight=logits(1, VOCAB, HIDDEN)),
    refusal("weight-dtype", TypeError, "weight", "bfloat16", "float32", weight=logits(VOCAB, HIDDEN).bfloat16()),
    refusal("weight-float8", TypeError, "weight", "float8", weight=logits(VOCAB, HIDDEN).to(torch.float8_e5m2)),
    refusal("weight-device", ValueError, "weight", "meta", "cpu", weight=logits(VOCAB, HIDDEN, device="meta")),
    refusal("bias-number", TypeError, "bias", "torch.Tensor", "float", bias=0.5),
    refusal("bias-shape", ValueError, "bias", "[7]", "(5,)", bias=logits(HIDDEN)),
    refusal("bias-2d", ValueError, "bias", "[7]", "(1, 7)", bias=logits(1, VOCAB)),
    refusal("bias-dtype", TypeError, "bias", "float64", "float32", bias=logits(VOCAB).double()),
    refusal("bias-device", ValueError, "bias", "meta", "cpu", bias=logits(VOCAB, device="meta")),
    refusal("softcap-zero", ValueError, "softcap", "positive", "0", softcap=0),
    refusal("softcap-negative", ValueError, "softcap", "positive", "-30.0", softcap=-30.0),
    refusal("softcap-nan", ValueError, "softcap", "finite", "nan", softcap=NAN),
    refusal("softcap-bool", TypeError, "softcap", "number", "True", softcap=True),
    refusal("softcap-string", TypeError, "softcap", "number", "'30'", softcap="30"),
    refusal("softcap-tensor", TypeError, "softcap", "number", "tensor(", softcap=torch.tensor(30.0)),
    refusal("logit_scale-zero", ValueError, "logit_scale", "other than 0", "0", logit_scale=0.0),
    refusal("logit_scale-infinite", ValueError, "logit_scale", "finite", "inf", logit_scale=INF),
    refusal("logit_scale-string", TypeError, "logit_scale", "number", "'2'", logit_scale="2"),
]

BAD_LOGITS = [
    refusal("tensor-list", TypeError, "Logits", "tensor", "list", tensor=[1.0]),
    refusal("tensor-integer", TypeError, "Logits", "tensor", "torch.int32", tensor=logits(dtype=torch.int32)),
    refusal("tensor-0d", ValueError, "Logits", "tensor", "[..., V]", "0-d", tensor=torch.zeros(())),
    refusal("tensor-nested", TypeError, "Logits", "tensor", "torch.Tensor", "Logits", tensor=kd.Logits(logits())),
    refusal("donate-string", TypeError, "Logits", "donate", "True or False", "'yes'", donate="yes"),
]


@pytest.mark.parametrize(
    ("name", "make", "error", "mentions"), BAD_DIVERGENCES, ids=[case[0].replace(": ", "-") for case in BAD_DIVERGENCES]
)
def test_divergence_refuses(
    name: str, make: Callable[[], Any], error: type[Exception], mentions: tuple[str, ...]
) -> None:
    parameter = name.partition("-")[0]
    check(refusal(name, error, parameter, *mentions), lambda **_: make())


@each(BAD_HEADS)
def test_head_refuses(refused: Refusal) -> None:
    named = refused._replace(mentions=("LMHead", *refused.mentions))
    check(named, lambda student, teacher, **changed: kd.LMHead(**(HEAD | changed)))


@each(BAD_LOGITS)
def test_logits_refuse(refused: Refusal) -> None:
    check(refused, lambda student, teacher, **changed: kd.Logits(**({"tensor": student} | changed)))


ACCEPTED: dict[str, dict[str, Any]] = {
    "integer-numbers": {"temperature": 2, "normalizer": 3, "ce_weight": 1, "labels": tokens(dtype=torch.int64)},
    "numpy-numbers": {
        "temperature": np.float32(2),
        "teacher_temperature": np.float64(3),
        "vocab_size": np.int64(5),
        "memory_budget": np.int32(1000),
        "divergence": kd.JSD(np.float32(0.25)),
    },
    "0d-tensors": {"temperature": torch.tensor(2.0), "weight": torch.tensor(0.5), "mask": torch.tensor(True)},
    "bf16-temperature": {"temperature": tokens(1.5, dtype=torch.bfloat16)},
    "integer-temperature": {"temperature": tokens(2, dtype=torch.int32)},
    "float64-weight": {"weight": tokens(0.5, dtype=torch.float64)},
    "integer-weight": {"weight": tokens(2, dtype=torch.int64)},
    "int32-labels": {"labels": tokens(3, dtype=torch.int32), "ce_weight": 0.5},
    "uint8-labels": {"labels": tokens(3, dtype=torch.uint8), "ce_weight": 0.5},
    "0d-label": {"labels": torch.tensor(3), "ce_weight": 0.5},
    "dropped-labels-out-of-range": {"labels": one_token(99, dtype=torch.int64), "ignore_index": 99, "ce_weight": 0.5},
    "masked-labels-out-of-range": {
        "labels": one_token(99, dtype=torch.int64),
        "mask": one_token(False, others=True, dtype=torch.bool),
        "ce_weight": 0.5,
    },
    "vocabulary-order": {"vocabulary_order": torch.arange(VOCAB).flip(0), "gradient_tolerance": 0.5},
    "integer-tensor-normalizer": {"normalizer": torch.tensor(4)},
    "no-tokens": {"student": torch.zeros(0, VOCAB), "teacher": torch.zeros(0, VOCAB)},
    "one-token": {"student": torch.zeros(VOCAB), "teacher": torch.zeros(VOCAB)},
}


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_loss_accepts(arguments: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    sources = {
        name: torch.randn(*arguments.get(name, logits()).shape, generator=generator, dtype=torch.float64)
        for name in ("student", "teacher")
    }
    arguments = arguments | sources
    ours = kd.distillation_loss(**arguments)
    del_names = {"memory_budget", "vocabulary_order", "gradient_tolerance"}
    reference = kd.reference.distillation_loss(**{k: v for k, v in arguments.items() if k not in del_names})
    torch.testing.assert_close(ours, reference)


@pytest.mark.slow
def test_labels_are_checked_under_torch_compile_too() -> None:
    """There a Python error is not possible, but reading past the row is not an alternative."""
    compiled = torch.compile(kd.distillation_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="labels"):
        call(compiled, labels=one_token(VOCAB, dtype=torch.int64), ce_weight=1.0)


def test_temperature_may_require_grad_without_grad_mode() -> None:
    with torch.no_grad():
        assert call(kd.distillation_loss, temperature=tokens().requires_grad_()).item() == 0


def test_error_of_autocast_free_heads_says_when_dtypes_may_differ() -> None:
    arguments = HEAD | {"weight": logits(VOCAB, HIDDEN).bfloat16()}
    with pytest.raises(TypeError, match="autocast"):
        kd.LMHead(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kd.LMHead(**arguments)


def test_debug_holds_until_told_otherwise_or_for_a_block() -> None:
    from kdkernels.debugging import values_are_checked

    elsewhere = torch.empty(1, device="meta")
    assert not values_are_checked(elsewhere)
    with kd.debug(True):
        assert values_are_checked(elsewhere)
    assert not values_are_checked(elsewhere)
    kd.debug(True)
    try:
        assert values_are_checked(elsewhere)
    finally:
        kd.debug(False)
    assert not values_are_checked(elsewhere)
