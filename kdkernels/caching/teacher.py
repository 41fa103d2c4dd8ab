"""A transformers causal language model as a teacher: hidden states and the head that makes logits of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels.caching.errors import CachingError
from kdkernels.sources import LMHead

__all__ = ["MISSING", "Teacher", "load_teacher"]

MISSING = 'teachers are read with transformers, which is not installed or not complete: pip install "kdkernels[cache]"'

FINGERPRINT_VALUES = 1024
"""Of each parameter, evenly spread, that the fingerprint looks at."""

PROBE_TOKENS = 8
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far the head's logits may be from the model's own, in units of their largest."""


@dataclass(frozen=True)
class HeadForm:
    """What a model does to the product of hidden states and head weight, by its configuration."""

    softcap: float | None = None
    logit_scale: float | None = None

    @classmethod
    def of(cls, config: Any) -> HeadForm:
        scale = getattr(config, "logit_scale", None)  # Cohere
        divisor = getattr(config, "logits_scaling", None)  # Granite
        if scale is None and divisor is not None:
            scale = 1 / divisor
        return cls(getattr(config, "final_logit_softcapping", None), scale)


class Teacher:
    """A causal language model that is only read.

    Args:
        model: a transformers causal language model, in eval mode.
        tokenizer: its tokenizer.
        name: of the folder or file it came from.

    Raises:
        CachingError: its logits are not those of a language-model head on its last hidden states.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.output = model.get_output_embeddings()
        self.form = HeadForm.of(model.config)
        self._check_head()

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def vocab_size(self) -> int:
        """Rows of the head, which may be more than the tokenizer has tokens."""
        return int(self.output.weight.shape[0])

    @property
    def longest_sequence(self) -> int | None:
        """In tokens, where the model says so."""
        found: int | None = getattr(self.model.config, "max_position_embeddings", None)
        return found

    @torch.no_grad()
    def head(self, input_ids: Tensor) -> LMHead:
        """The logits that follow ``input_ids [sequences, tokens]``, as hidden states and head."""
        hidden = self.model.base_model(input_ids=input_ids.to(self.device), use_cache=False)[0]
        weight, bias = self.output.weight, getattr(self.output, "bias", None)
        return LMHead(
            hidden.to(weight.dtype), weight, bias, softcap=self.form.softcap, logit_scale=self.form.logit_scale
        )

    @torch.no_grad()
    def _check_head(self) -> None:
        """Compares with the model's own logits on a few tokens: nobody else would notice a factor that is missing."""
        if self.output is None:
            raise CachingError(f"{self.name}: a {type(self.model).__name__} has no language-model head")
        ids = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.vocab_size
        expected = self.model(input_ids=ids, use_cache=False).logits.double()
        head = self.head(ids)
        logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias).double()
        if head.logit_scale is not None:
            logits = logits * head.logit_scale
        if head.softcap is not None:
            logits = head.softcap * (logits / head.softcap).tanh()
        tolerance = PROBE_TOLERANCE.get(head.weight.dtype, 5e-2) * expected.abs().max()
        if expected.shape != logits.shape or not bool(((expected - logits).abs() <= tolerance).all()):
            raise CachingError(
                f"{self.name}: the logits of a {type(self.model).__name__} are not those of a plain head on its last hidden "
                f"states, so they cannot be picked from without being stored; this command cannot serve it"
            )

    @torch.no_grad()
    def fingerprint(self) -> str:
        """A hash of the parameters: the same weights have the same, wherever they lie."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            flat = value.reshape(-1)
            places = torch.arange(min(flat.numel(), FINGERPRINT_VALUES)) * flat.numel() // FINGERPRINT_VALUES
            if flat.numel() <= FINGERPRINT_VALUES:
                places = torch.arange(flat.numel())
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(flat[places.to(flat.device)].double().cpu().numpy().tobytes())
        return f"sha256:{digest.hexdigest()[:32]}"

    def describe(self) -> str:
        """For people and for comparisons: name, dtype and fingerprint."""
        return f"{self.name}, {str(self.output.weight.dtype).removeprefix('torch.')}, {self.fingerprint()}"


def find_weights(folder: Path, gguf_file: str | None) -> str | None:
    """The GGUF file to read; None: the folder holds a model in transformers' own form."""
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise CachingError(f"--gguf-file {gguf_file}: there is no such file in {folder}")
        return gguf_file
    if (folder / "config.json").is_file():
        return None
    found = sorted(path.name for path in folder.glob("*.gguf"))
    if not found:
        raise CachingError(f"--teacher {folder}: neither a config.json nor a .gguf file is in this folder")
    if len(found) > 1:
        raise CachingError(f"--teacher {folder}: several GGUF files; choose with --gguf-file: {', '.join(found)}")
    return found[0]


def load_teacher(
    path: str | os.PathLike[str],
    *,
    gguf_file: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Teacher:
    """Loads a model from this machine's disk; nothing is fetched from anywhere, and no code of the model's is run.

    Args:
        path: a folder as ``save_pretrained`` writes it, a folder with a GGUF file, or a GGUF file.
        gguf_file: which file of the folder, where there are several.
        dtype: None: float32 on the CPU, elsewhere that of the weights.

    Raises:
        CachingError: it is not there or cannot be read, or a package is missing.
    """
    folder = Path(path).expanduser()
    if folder.is_file() and folder.suffix == ".gguf" and gguf_file is None:
        folder, gguf_file = folder.parent, folder.name
    if not folder.is_dir():
        raise CachingError(f"--teacher {path}: there is no such folder (models are not downloaded)")
    gguf_file = find_weights(folder, gguf_file)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        if gguf_file is not None:
            import accelerate  # noqa: F401  (transformers needs both to read GGUF files)
            import gguf  # noqa: F401
    except ImportError as error:
        raise CachingError(f"{MISSING} ({error})") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"local_files_only": True} | ({} if gguf_file is None else {"gguf_file": gguf_file})
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar cannot be turned off otherwise
            tokenizer = AutoTokenizer.from_pretrained(folder, **source)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", **source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CachingError(f"--teacher {path}: transformers cannot load it: {first}") from error
    name = folder.resolve().name if gguf_file is None else Path(gguf_file).stem
    return Teacher(model.to(device).eval().requires_grad_(False), tokenizer, name)
