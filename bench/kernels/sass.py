"""Machine code of one kernel, as cuobjdump and nvdisasm print it, and its main path."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

WIDE = 16  # bytes of the accesses that the main path is made of

_GLOBAL = re.compile(r"(LDG|STG|LD|ST|ATOM|ATOMG|RED|REDG|LDGSTS)\b")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Access:
    """An access to global memory, or to memory of unknown kind."""

    kind: str  # "load", "store" or, with anything that is both, "other"
    width: int  # bytes


@dataclass(frozen=True)
class MainPath:
    """The instructions that full and aligned packs pass, and what they access.

    Attributes:
        loop: whether they are the body of a loop; else they lead from the kernel's entry to its
            exit.
        operations: how often each operation occurs, with its modifiers.
        accesses: how often each kind of access to global memory occurs.
        under_way: bytes that a thread has asked for by wide loads before it waits for any of them.
    """

    loop: bool
    operations: Counter[str]
    accesses: Counter[Access]
    under_way: int

    def bytes(self, kind: str) -> int:
        """Bytes that a thread loads or stores by wide accesses in one pass."""
        return sum(
            n * access.width
            for access, n in self.accesses.items()
            if access.kind == kind and access.width >= WIDE
        )


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel, by address: `@!P0 LDG.E.128 R4, desc[UR4][R2.64]`."""

    instructions: dict[int, str]

    @classmethod
    def of(cls, listing: str) -> Code:
        """Reads lines of `/*0010*/  LDG.E.128 R4, desc[UR4][R2.64] ;`, jumps to addresses."""
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", listing)
        return cls({int(address, 16): text for address, text in found})

    def operation(self, address: int) -> str:
        """The operation with its modifiers, without the predicate: `LDG.E.128`."""
        return re.sub(r"^@\S+ ", "", self.instructions[address]).split()[0]

    def count(self, addresses: Iterable[int] | None = None) -> Counter[str]:
        """How often each operation occurs in all of the code or a part."""
        chosen = self.instructions if addresses is None else addresses
        return Counter(self.operation(address) for address in chosen)

    @cached_property
    def local_accesses(self) -> int:
        """Instructions that access local memory: spilled registers, arrays on the stack."""
        return sum(n for name, n in self.count().items() if re.match(r"(LDL|STL)\b", name))

    @cached_property
    def _accesses(self) -> dict[int, Access]:
        found = {}
        for address in self.instructions:
            operation = self.operation(address)
            if match := _GLOBAL.match(operation):
                kind = {"LDG": "load", "STG": "store"}.get(match[1], "other")
                widths = [_WIDTHS[part] for part in operation.split(".") if part in _WIDTHS]
                found[address] = Access(kind, *(widths or [4]))
        return found

    @cached_property
    def _successors(self) -> dict[int, list[int]]:
        """Where control may go from each instruction; a call leads nowhere (see `main_path`)."""
        addresses = list(self.instructions)
        after = dict(zip(addresses, [*addresses[1:], None], strict=True))
        found: dict[int, list[int]] = {}
        for address, instruction in self.instructions.items():
            name = self.operation(address).split(".")[0]
            if name in {"BRX", "JMP", "JMX", "BRXU"}:
                raise ValueError(f"a jump that this cannot follow: {instruction}")
            following = after[address]
            targets = [] if following is None else [following]
            conditional = instruction.startswith("@")
            if name in {"EXIT", "RET", "CALL"} and not conditional:
                targets = []
            elif name == "BRA":
                target = int(instruction.rsplit("0x", 1)[1], 16)
                always = re.fullmatch(r"BRA\S* 0x[0-9a-f]+", instruction)
                targets = [target] if always else [*targets, target]
            found[address] = targets
        return found

    @cached_property
    def main_path(self) -> MainPath | None:
        """What a thread passes whose packs are full and aligned; None without a wide access.

        If wide accesses go round by themselves, it is that loop: the instructions with narrower
        accesses are taken out of the control flow graph, and what a wide access can then reach and
        be reached from is the loop over full packs. Otherwise it is the way from the kernel's entry
        through wide accesses to the exit without a narrower store; narrower loads may look up there
        what is to be done.

        The subroutines of an IEEE division or square root, for operands out of the ordinary, are no
        part of it, nor is what leads to their calls.
        """
        wide = {a for a, access in self._accesses.items() if access.width >= WIDE}
        if not wide:
            return None
        narrow = self._accesses.keys() - wide
        forward, backward = self._graph(without=narrow)
        for start in sorted(wide):
            if loop := _reached({start}, forward) & _reached({start}, backward):
                return self._path(loop, True)

        stores = {a for a in narrow if self._accesses[a].kind != "load"}
        forward, backward = self._graph(without=stores)
        ends = {a for a in self.instructions if self.operation(a) == "EXIT"} - stores
        entry = {min(self.instructions)}
        through = _reached(wide, forward) | _reached(wide, backward) | wide
        found = through & (_reached(entry, forward) | entry) & (_reached(ends, backward) | ends)
        return self._path(found, False) if found & wide else None

    def _path(self, addresses: set[int], loop: bool) -> MainPath:
        accesses = Counter(self._accesses[a] for a in addresses & self._accesses.keys())
        return MainPath(loop, self.count(addresses), accesses, self._under_way(addresses))

    def _under_way(self, addresses: Iterable[int]) -> int:
        """Bytes of the wide loads that precede the first use of a register which they write."""
        total, written = 0, set()
        for address in sorted(addresses):
            used = [int(n) for n in re.findall(r"\bR(\d+)", self.instructions[address])]
            access = self._accesses.get(address)
            if access is None or access.kind != "load" or access.width < WIDE:
                if written.intersection(used):
                    break
                continue
            targets = range(used[0], used[0] + access.width // 4)
            if written.intersection([*targets, *used]):
                break
            written.update(targets)
            total += access.width
        return total

    def _graph(self, without: set[int]) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """The control flow graph, forward and backward, without some instructions."""
        kept = self.instructions.keys() - without
        forward: dict[int, list[int]] = {a: [] for a in kept}
        backward: dict[int, list[int]] = {a: [] for a in kept}
        for source in kept:
            for target in self._successors[source]:
                if target in kept:
                    forward[source].append(target)
                    backward[target].append(source)
        return forward, backward


def _reached(starts: set[int], edges: dict[int, list[int]]) -> set[int]:
    """What can be reached from any of `starts` in one step or more."""
    found: set[int] = set()
    waiting = [target for start in starts for target in edges[start]]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += edges[node]
    return found
