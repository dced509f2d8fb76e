"""Reads what ptxas and cuobjdump say of the update kernels: their resources, their main path."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

_SYMBOL = re.compile(
    r"4AdamILb([01])ELb([01])EE.*?8FormatOfI((?:f|NS_\d+b?float16E|S[0-9A-Z]*_)+)E"
)
_TYPE = re.compile(r"f|NS_\d+(b?float16)E|S[0-9A-Z]*_")


class Kernel(NamedTuple):
    """Which instance of the update kernel a symbol is."""

    l2: bool
    amsgrad: bool
    dtypes: tuple[str, str, str]  # param, grad, state

    @classmethod
    def of(cls, symbol: str) -> Kernel:
        """Reads a mangled name; the second mention of a type there is a mere reference."""
        match = _SYMBOL.search(symbol)
        assert match, symbol
        dtypes: list[str] = []
        for found in _TYPE.finditer(match[3]):
            if found[0] == "f":
                dtypes.append("float32")
            else:  # a format has one type of 16 bits at most
                dtypes.append(found[1] or next(d for d in dtypes if d != "float32"))
        param, grad, state = dtypes
        return cls(match[1] == "1", match[2] == "1", (param, grad, state))

    @property
    def loaded(self) -> list[str]:
        """The dtype of every array that is read."""
        param, grad, state = self.dtypes
        return [param, grad, *[state] * (3 if self.amsgrad else 2)]

    @property
    def stored(self) -> list[str]:
        """The dtype of every array that is written: all but the gradient."""
        return [self.dtypes[0], *self.loaded[2:]]

    @property
    def elements_per_thread(self) -> int:
        """Elements of a full pack: 16 bytes of the narrowest array."""
        return 16 // min(BYTES[dtype] for dtype in self.dtypes)

    def __str__(self) -> str:
        options = "".join(n for n, on in (("-l2", self.l2), ("-amsgrad", self.amsgrad)) if on)
        return f"adam{options}-{'-'.join(self.dtypes)}"


class Resources(NamedTuple):
    """What `ptxas -v` reports of a kernel."""

    registers: int
    stack: int
    spills: int  # bytes, stored and loaded


def resources(log: str) -> dict[Kernel, Resources]:
    """Reads the output of `ptxas -v`."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return {
        Kernel.of(symbol): Resources(int(registers), int(stack), int(stores) + int(loads))
        for symbol, stack, stores, loads, registers in found
    }


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, by address: `@!P0 LDG.E.128 R4, desc[UR4][R2.64]`."""

    instructions: dict[int, str]

    @staticmethod
    def operation(instruction: str) -> str:
        """The operation with its modifiers, without the predicate: `LDG.E.128`."""
        return re.sub(r"^@\S+ ", "", instruction).split()[0]

    def count(self, addresses: set[int] | None = None) -> Counter[str]:
        """How often each operation occurs, with its modifiers, in all of the code or a part."""
        chosen = self.instructions.keys() if addresses is None else addresses
        return Counter(self.operation(self.instructions[address]) for address in chosen)

    def touches_global(self, address: int) -> bool:
        """Whether an instruction reads or writes global memory, or memory of unknown kind."""
        name = self.operation(self.instructions[address]).split(".")[0]
        return name in {"LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS"}

    def is_wide(self, address: int) -> bool:
        """Whether an instruction is a global access of 16 bytes."""
        return bool(re.match(r"(LDG|STG)\S*\.128\b", self.operation(self.instructions[address])))

    @cached_property
    def successors(self) -> dict[int, list[int]]:
        """Where control may go from each instruction; a call is taken to return."""
        addresses = list(self.instructions)
        after = dict(zip(addresses, [*addresses[1:], None], strict=True))
        found: dict[int, list[int]] = {}
        for address, instruction in self.instructions.items():
            name = self.operation(instruction).split(".")[0]
            assert name not in {"BRX", "JMP", "JMX", "BRXU"}, "a jump that this does not follow"
            following = after[address]
            targets = [] if following is None else [following]
            if name in {"EXIT", "RET"} and not instruction.startswith("@"):
                targets = []
            elif name == "BRA":
                target = int(instruction.rsplit("0x", 1)[1], 16)
                always = re.fullmatch(r"BRA\S* 0x[0-9a-f]+", instruction)
                targets = [target] if always else [*targets, target]
            found[address] = targets
        return found

    def main_loop(self) -> set[int]:
        """The addresses of the loop over full packs: what 16-byte accesses alone go round.

        The instructions with narrower global accesses are taken out of the control flow graph. What
        a wide access can then reach and be reached from again is the loop of a thread whose packs
        are full and aligned; empty if there is no way round without a narrower access.
        """
        kept = {
            address
            for address in self.instructions
            if self.is_wide(address) or not self.touches_global(address)
        }
        forward: dict[int, list[int]] = {a: [] for a in kept}
        backward: dict[int, list[int]] = {a: [] for a in kept}
        for source in kept:
            for target in self.successors[source]:
                if target in kept:
                    forward[source].append(target)
                    backward[target].append(source)
        start = next((address for address in sorted(kept) if self.is_wide(address)), None)
        if start is None:
            return set()
        return _reached(start, forward) & _reached(start, backward)


def _reached(start: int, edges: dict[int, list[int]]) -> set[int]:
    """What can be reached from `start` in one step or more."""
    found: set[int] = set()
    waiting = list(edges[start])
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += edges[node]
    return found


def disassembly(text: str) -> Iterator[tuple[Kernel, Code]]:
    """Reads the output of `cuobjdump -sass`."""
    for section in text.split("Function : ")[1:]:
        symbol, body = section.split("\n", 1)
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", body)
        yield Kernel.of(symbol), Code({int(address, 16): text for address, text in found})
