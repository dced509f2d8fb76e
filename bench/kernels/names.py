"""Which rule, variant and storage format a compiled kernel is, from its name."""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RULES = Path(__file__).parents[2] / "csrc" / "rules"

ARRAYS = ("param", "grad", "states")  # of which a kernel's dtypes are
# C++ types -> dtypes, and their bytes.
DTYPES = {"float": "float32", "bfloat16": "bfloat16", "float16": "float16"}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Storages whose dtypes a kernel tells apart when it runs, as csrc/cuda/storages.h has them.
TOLD_APART = ("Mixed", "Joined", "Coded")


@dataclass(frozen=True, order=True)
class Kernel:
    """An instance of a kernel template.

    Attributes:
        function: the template's name.
        rule: the functor's name in lower case; empty for a kernel that takes none.
        options: the functor's compile-time options, in order: name and value.
        dtypes: of param, grad and states; empty where the kernel tells them apart when it runs.
        whole: whether it also averages, zeroes and observes.
        storage: where it tells dtypes apart, "mixed"; "joined" with something beside the param, or
            stochastic rounding; "coded" with states of codes.
    """

    function: str
    rule: str
    options: tuple[tuple[str, bool | str], ...]
    dtypes: tuple[str, ...]
    whole: bool = False
    storage: str = ""

    @classmethod
    def of(cls, demangled: str) -> Kernel:
        """Reads `space::kernel<space::Rule<option, ...>, space::Storage>`.

        Every template argument may be missing. The storage is `Uniform<type>`, which all arrays
        have, or one of `TOLD_APART`; a bool says whether the kernel is of a whole step; the first
        other argument is the rule, and what more there may be counts as an option.
        """
        cast, space = r"\([\w:]+\)", r"(?:\w+|\(anonymous namespace\))::"  # 2 of (Decay)2
        bare = re.sub(rf"{cast}|{space}|^void |\s", "", demangled)
        function, arguments = _split(bare)
        rule, values, dtypes, more, whole, storage = "", [], (), [], False, ""
        for argument in arguments:
            name, inner = _split(argument)
            if name in ("true", "false"):
                whole = name == "true"
            elif name == "Uniform":
                dtypes = (DTYPES[inner[0]],) * len(ARRAYS)
            elif name in TOLD_APART:
                storage = name.lower()
            elif rule:
                more.append((_words(argument, "-"), True))
            else:
                rule, values = name, inner
        names = _option_names().get(rule, ())
        options = tuple(
            (names[i] if i < len(names) else str(i), {"true": True, "false": False}.get(x, x))
            for i, x in enumerate(values)
        )
        return cls(function, _words(rule, "_"), (*options, *more), dtypes, whole, storage)

    @classmethod
    def restored(cls, fields: dict[str, Any]) -> Kernel:
        """The inverse of `dataclasses.asdict`, by way of JSON."""
        options = tuple((name, value) for name, value in fields["options"])
        return cls(**{**fields, "options": options, "dtypes": tuple(fields["dtypes"])})

    @property
    def variant(self) -> str:
        """The options that are on, or what they are set to."""
        on = [k if v is True else f"{k}={v}" for k, v in self.options if v is not False]
        return " ".join(on)

    @property
    def functor(self) -> tuple[str, tuple[bool | str, ...]]:
        """The rule and what its options are set to."""
        return self.rule, tuple(value for _, value in self.options)

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of an element of each of `dtypes`."""
        return tuple(BYTES[dtype] for dtype in self.dtypes)

    def __str__(self) -> str:
        storage = self.dtypes or (self.storage,)
        whole = "whole" if self.whole else ""
        return "-".join(filter(None, (self.rule or self.function, self.variant, *storage, whole)))


def demangled(symbols: Iterable[str]) -> dict[str, str]:
    """The names of C++ functions without their parameters, by mangled name."""
    mangled = list(symbols)
    command = ["c++filt", "--no-params"]  # of binutils, like the assembler that nvcc needs
    text = subprocess.run(
        command, input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    return dict(zip(mangled, text.splitlines(), strict=True))


def _split(text: str) -> tuple[str, list[str]]:
    """`name<a,b<c>>` -> `name`, [`a`, `b<c>`]."""
    name, _, rest = text.partition("<")
    arguments, depth = [""], 0
    for character in rest.removesuffix(">"):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            arguments.append("")
        else:
            arguments[-1] += character
    return name, arguments if rest else []


@functools.cache
def _option_names() -> dict[str, tuple[str, ...]]:
    """The names of every functor's template parameters, which a compiled name does not carry."""
    found = {}
    for header in sorted(RULES.glob("*.h")):
        templates = re.findall(r"template <([^<>]+)>\s*struct (\w+)", header.read_text())
        for parameters, functor in templates:
            names = re.findall(r"\bk(\w+)", parameters)
            found[functor] = tuple(_words(name, "-") for name in names)
    return found


def _words(name: str, separator: str) -> str:
    """`MaxSq` -> `max-sq`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", separator, name).lower()
