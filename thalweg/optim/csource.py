"""From a recorded program to the source of one C function that runs it over a list of parameters.

A parameter is walked row by row. Uniform values are computed once, before the walk. A program that works element by element
sees a parameter as rows of ``TILE`` elements, and threads take equal shares of all rows of all parameters. Sums over a row
are taken in a loop over that row, just before what needs them; sums over columns or a whole parameter need a walk of their
own, then a barrier: nothing is written before the last walk, so each walk reads the values from before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from thalweg.optim.cops import REDUCTIONS, STORED, TYPES, expression, first_of, load, values
from thalweg.optim.trace import Node, Trace, Value

TILE = 4096

_HEAD = """\
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <omp.h>
static inline float f_of_i(int32_t i) { float f; memcpy(&f, &i, 4); return f; }
static inline int32_t i_of_f(float f) { int32_t i; memcpy(&i, &f, 4); return i; }
static inline float bf16load(uint16_t b) { return f_of_i((int32_t)((uint32_t)b << 16)); }
static inline float bf16_round(float x) {
    uint32_t i = (uint32_t)i_of_f(x);
    uint32_t near = (i + 0x7fffu + ((i >> 16) & 1u)) & 0xffff0000u;
    return x != x ? x : f_of_i((int32_t)near);
}
static inline uint16_t bf16_store(float x) { return (uint16_t)((uint32_t)i_of_f(x) >> 16); }
"""


@dataclass(frozen=True)
class Port:
    """One tensor that the kernel reads, and perhaps writes: its name, kind and stored dtype."""

    name: str
    kind: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Source:
    """C source, and what it needs of scratch memory.

    Attributes:
        scalars: names of the 0-dim tensors, in the order of their pointers.
        per_row: doubles for each row; of the longest parameter, or of all together where ``flat``.
        per_column: doubles for each column, times the number of threads and one.
    """

    text: str
    scalars: tuple[str, ...]
    per_row: int
    per_column: int
    flat: bool


def write_source(
    trace: Trace,
    ports: Sequence[Port],
    outputs: Sequence[str | None],
    *,
    width: int | None,
    sums: int = 0,
    clears: str | None = None,
) -> Source:
    """C source of ``run(num, rows, cols, sizes, firsts, pointers, scalars, skipped, sums, scratch, threads)``.

    Args:
        trace: inputs named as ``ports`` and the scalars; an input "index" is the number of the element.
        ports: the tensors of each parameter, in the order of its pointers.
        outputs: for each output of the trace, the port or scalar it is written to, or None for one of the ``sums``.
        width: elements of a row for programs that see parameters as flat; None: matrices of (rows, cols).
        sums: how many outputs are numbers to be added up over all parameters.
        clears: a port that holds zeros afterwards, whether the update is skipped or not.
    """
    writer = _Writer(trace, ports, outputs, width, sums, clears)
    per_row = sums if writer.flat else len(writer.tensor_sums)
    return Source(writer.text(), tuple(writer.scalars), per_row, len(writer.column_sums), writer.flat)


class _Writer:
    def __init__(
        self,
        trace: Trace,
        ports: Sequence[Port],
        outputs: Sequence[str | None],
        width: int | None,
        sums: int,
        clears: str | None,
    ) -> None:
        self.clears = next((i for i, port in enumerate(ports) if port.name == clears), None)
        self.trace, self.ports, self.outputs, self.width, self.num_sums = trace, ports, outputs, width, sums
        self.made = {node.out: node for node in trace.nodes}
        self.named = {value: name for name, value in trace.inputs.items()}
        self.scalars = [name for name, v in trace.inputs.items() if v.kind == "uniform"]
        self.level = self._levels()
        self.last = max(self.level[out] - (place is None) for out, place in zip(trace.outputs, outputs))
        self.tensor_sums = [n for n in trace.nodes if self._is_reduction(n) and n.out.kind == "tensor"]
        self.column_sums = [n for n in trace.nodes if self._is_reduction(n) and n.out.kind == "column"]
        self.flat = width is not None and self.last == 0 and not self.column_sums and not self._staged_sums()

    # ------------------------------------------------------------------ what is computed where

    def _is_reduction(self, node: Node) -> bool:
        if node.op not in REDUCTIONS:
            return False
        source = next(a for a in node.args if isinstance(a, Value))
        return source.kind != node.out.kind

    def _staged_sums(self) -> bool:
        """Whether a sum over a parameter is more than one of the kernel's own sums as it is."""
        used = {a for node in self.trace.nodes for a in values(node)}
        asked = {v for v, place in zip(self.trace.outputs, self.outputs) if place is None}
        return any(node.out in used or node.op != "sum" for node in self.tensor_sums) or not asked <= {
            node.out for node in self.tensor_sums
        }

    def _levels(self) -> dict[Value, int]:
        """How many walks must have ended before a value can be computed."""
        level = dict.fromkeys(self.trace.inputs.values(), 0)
        for node in self.trace.nodes:
            deep = max((level[a] for a in values(node)), default=0)
            walked = self._is_reduction(node) and node.out.kind in ("tensor", "column")
            if walked and first_of(node).kind == "column":
                walked = False  # a column's sum needs no walk
            level[node.out] = deep + 1 if walked else deep
        return level

    def _slice(self, targets: Iterable[Value], stop: Callable[[Value], bool]) -> list[Node]:
        """The operations that the targets need, in order, not looking behind values where ``stop``."""
        wanted, found = list(targets), set()
        while wanted:
            value = wanted.pop()
            if value in found or value not in self.made or stop(value):
                continue
            found.add(value)
            wanted += values(self.made[value])
        return [node for node in self.trace.nodes if node.out in found]

    # ------------------------------------------------------------------ text

    def text(self) -> str:
        body = self._flat_body() if self.flat else self._staged_body()
        return _HEAD + (
            "void run(int64_t num, const int64_t *rows, const int64_t *cols, const int64_t *sizes, const int64_t *firsts,\n"
            "         void *const *pointers, void *const *scalars, const double *skipped, double *sums, double *scratch,\n"
            "         int threads) {\n"
            f"    if (skipped && *skipped > 0) {{ {self._clear_all()}return; }}\n" + body + "}\n"
        )

    def _clear_all(self) -> str:
        if self.clears is None:
            return ""
        place, size = f"pointers[i * {len(self.ports)} + {self.clears}]", STORED[self.ports[self.clears].dtype]
        return f"for (int64_t i = 0; i < num; i++) memset({place}, 0, sizes[i] * sizeof({size})); "

    def _scalar_lines(self) -> list[str]:
        lines = []
        for i, name in enumerate(self.scalars):
            value = self.trace.inputs[name]
            lines.append(f"const {TYPES[value.dtype]} v{value.number} = {load(f'scalars[{i}]', '0', value.dtype)};")
        uniform = [node for node in self.trace.nodes if node.out.kind == "uniform"]
        return lines + [self._assign(node) for node in uniform]

    def _pointer_lines(self) -> list[str]:
        lines = []
        for i, port in enumerate(self.ports):
            lines.append(f"{STORED[port.dtype]} *restrict a{i} = pointers[i * {len(self.ports)} + {i}];")
        return lines

    def _flat_body(self) -> str:
        """Element by element (and by rows of ``width``): threads share the rows of all parameters."""
        setup = [
            "int64_t all = 0;",
            f"for (int64_t i = 0; i < num; i++) all += (sizes[i] + {self.width} - 1) / {self.width};",
        ]
        setup += self._scalar_lines()
        inner = [
            "int tid = omp_get_thread_num(), crew = omp_get_num_threads();",
            "int64_t lo = all * tid / crew, hi = all * (tid + 1) / crew, first = 0;",
            "for (int64_t i = 0; i < num && first < hi; i++) {",
            f"int64_t mine = (sizes[i] + {self.width} - 1) / {self.width};",
            "if (first + mine > lo) {",
            *self._pointer_lines(),
            "int64_t from = lo > first ? lo - first : 0, to = hi - first < mine ? hi - first : mine;",
            "for (int64_t r = from; r < to; r++) {",
            f"const int64_t base = r * {self.width}, n = sizes[i] - base < {self.width} ? sizes[i] - base : {self.width};",
            *self._row(0, "first + r"),
            "}",
            "}",
            "first += mine;",
            "}",
        ]
        after = []
        if self.num_sums:
            after = [
                f"for (int k = 0; k < {self.num_sums}; k++) {{ double total = 0;",
                f"for (int64_t r = 0; r < all; r++) total += scratch[r * {self.num_sums} + k];",
                "sums[k] = total; }",
            ]
        return _lines(
            setup, ["#pragma omp parallel num_threads(threads)", "{", *inner, "}"], after, self._uniform_stores()
        )

    def _staged_body(self) -> str:
        """A walk for each level of sums, one parameter after the other, all threads on each."""
        partials = len(self.tensor_sums)
        setup = [f"for (int k = 0; k < {self.num_sums}; k++) sums[k] = 0;", *self._scalar_lines()]
        per = ["const int64_t size = sizes[i]; (void)size;"]
        if self.width is not None:
            per += [f"const int64_t R = (size + {self.width} - 1) / {self.width}, C = {self.width};"]
        else:
            per += ["const int64_t R = rows[i], C = cols[i];"]
        per += ["const int64_t lo = R * tid / crew, hi = R * (tid + 1) / crew;"]
        per += [f"double *part = scratch, *wide = scratch + R * {partials}; (void)part; (void)wide;"]
        per += self._pointer_lines()
        per += self._load_tensors()
        per += self._tensor_lines(0)
        for stage in range(self.last + 1):
            if stage:
                per += self._tensor_lines(stage)
            mine = [n for n in self.column_sums if self.level[n.out] == stage + 1]
            for node in mine:
                k = self.column_sums.index(node)
                per += [
                    f"double *q{node.out.number} = wide + C * ({k} * (crew + 1) + 1 + tid);",
                    f"for (int64_t j = 0; j < C; j++) q{node.out.number}[j] = {_identity(node.op)};",
                ]
            per += ["for (int64_t r = lo; r < hi; r++) {"]
            if self.width is not None:
                per += [
                    f"const int64_t base = r * {self.width}, n = size - base < {self.width} ? size - base : {self.width};"
                ]
            else:
                per += ["const int64_t base = r * C, n = C;"]
            per += self._row(stage, "r")
            per += ["}", "#pragma omp barrier"]
            per += self._combine(stage)
        per += self._epilogue()
        per += ["#pragma omp barrier"]
        inner = ["int tid = omp_get_thread_num(), crew = omp_get_num_threads();"]
        inner += ["for (int64_t i = 0; i < num; i++) {", *per, "}"]
        return _lines(setup, ["#pragma omp parallel num_threads(threads)", "{", *inner, "}"], self._uniform_stores())

    def _load_tensors(self) -> list[str]:
        lines = []
        for i, port in enumerate(self.ports):
            if port.kind == "tensor":
                value = self.trace.inputs[port.name]
                lines.append(f"const {TYPES[value.dtype]} v{value.number} = {load(f'a{i}', '0', value.dtype)};")
        return lines

    def _tensor_lines(self, stage: int) -> list[str]:
        """Numbers of the parameter that can be computed when ``stage`` walks have ended."""
        lines = []
        for node in self.trace.nodes:
            if node.out.kind != "tensor" or self.level[node.out] != stage:
                continue
            if self._is_reduction(node):
                origin = first_of(node)
                if origin.kind == "column":
                    lines += self._sum_of_column(node)
                continue
            lines.append(self._assign(node))
        return lines

    def _sum_of_column(self, node: Node) -> list[str]:
        origin = first_of(node)
        number, name = node.out.number, f"s{node.out.number}"
        lines = [
            f"double {name} = {_identity(node.op)};",
            "for (int64_t j = 0; j < C; j++) {",
            "const int64_t base = 0; (void)base;",
        ]
        lines += self._column_lines([origin])
        lines += [_accumulate(node.op, name, f"v{origin.number}"), "}"]
        return [*lines, f"const {TYPES[node.out.dtype]} v{number} = {_finish(node.op, name, 'C')};"]

    def _column_lines(self, targets: Sequence[Value]) -> list[str]:
        """Values of one column j, from what is stored and summed."""
        stop = lambda v: v.kind in ("tensor", "uniform", "row") or (v in self.made and self._is_reduction(self.made[v]))
        lines = []
        needed = self._slice(targets, stop)
        for value in self._leaves(needed, targets):
            if value.kind == "column":
                lines.append(self._load_column(value))
        return lines + [self._assign(node) for node in needed]

    def _load_column(self, value: Value) -> str:
        if value in self.named:
            i = next(k for k, port in enumerate(self.ports) if port.name == self.named[value])
            return f"const {TYPES[value.dtype]} v{value.number} = {load(f'a{i}', 'j', value.dtype)};"
        return f"const {TYPES[value.dtype]} v{value.number} = ({TYPES[value.dtype]})c{value.number}[j];"

    def _leaves(self, nodes: Sequence[Node], targets: Iterable[Value]) -> list[Value]:
        inside = {node.out for node in nodes}
        asked = [*targets, *(a for node in nodes for a in values(node))]
        return [v for v in dict.fromkeys(asked) if v not in inside]

    def _row(self, stage: int, row: str) -> list[str]:
        """All that is done with one row in one walk: sums over the row first, each in its loop, then the rest."""
        final = stage == self.last
        sums = [n for n in [*self.tensor_sums, *self.column_sums] if self.level[n.out] == stage + 1]
        targets = [first_of(n) for n in sums if first_of(n).kind != "column"]
        sums = [n for n in sums if first_of(n).kind != "column"]
        if final:
            targets += [v for v, place in zip(self.trace.outputs, self.outputs) if v.kind in ("full", "row")]
        if not targets:
            return []
        everything = self._slice(targets, lambda v: v.kind in ("tensor", "uniform") or self._walked(v))
        lines = [self._load_row(v) for v in self._leaves(everything, targets) if v.kind == "row" and v in self.named]
        done: set[Value] = set()
        kept: dict[Value, None] = {}
        row_sums = [n for n in everything if n.out.kind == "row" and self._is_reduction(n)]
        while True:
            lines += self._row_values(everything, done, row_sums)
            ready = [n for n in row_sums if n.out not in done and self._row_ready(n, done, row_sums)]
            if not ready:
                break
            operands = [first_of(n) for n in ready]
            keep = self._frontier(operands, targets, kept) if self.width is not None else []
            lines += [f"{TYPES[v.dtype]} k{v.number}[{self.width}];" for v in keep]
            lines += self._loop(list(zip(ready, operands)), [], row, kept, keep)
            kept |= dict.fromkeys(keep)
            done |= {n.out for n in ready}
        stores = []
        if final:
            stores = [(v, p) for v, p in zip(self.trace.outputs, self.outputs) if v.kind == "full" and p is not None]
        lines += self._loop([(n, first_of(n)) for n in sums], stores, row, kept)
        if final:
            for value, place in zip(self.trace.outputs, self.outputs):
                if value.kind == "row" and place is not None:
                    lines.append(self._store(place, value, "r"))
        return lines

    def _walked(self, value: Value) -> bool:
        """Whether a value is the sum of an earlier walk."""
        return value in self.made and self._is_reduction(self.made[value]) and value.kind in ("tensor", "column")

    def _row_ready(self, node: Node, done: set[Value], row_sums: Sequence[Node]) -> bool:
        waiting = {n.out for n in row_sums} - done - {node.out}
        behind = self._slice(values(node), lambda v: v in done or v.kind in ("tensor", "uniform") or self._walked(v))
        return not any(n.out in waiting for n in behind)

    def _row_values(self, everything: Sequence[Node], done: set[Value], row_sums: Sequence[Node]) -> list[str]:
        """Numbers of the row that need no sum still to come."""
        lines = []
        sums = {n.out for n in row_sums}
        for node in everything:
            if node.out.kind != "row" or node.out in done or node.out in sums:
                continue
            if all(a.kind in ("tensor", "uniform") or a in done or a in self.named for a in values(node)):
                lines.append(self._assign(node))
                done.add(node.out)
        return lines

    def _load_row(self, value: Value) -> str:
        i = next(k for k, port in enumerate(self.ports) if port.name == self.named[value])
        return f"const {TYPES[value.dtype]} v{value.number} = {load(f'a{i}', 'r', value.dtype)};"

    def _frontier(self, now: Sequence[Value], later: Sequence[Value], kept: Collection[Value]) -> list[Value]:
        """What the loop for ``now`` computes and a later one uses: kept for it, so that nothing is computed twice."""
        stop = lambda v: v.kind in ("tensor", "uniform", "row") or self._walked(v) or v in kept
        here = {node.out for node in self._slice(now, stop)}
        rest = self._slice(later, lambda v: v.kind in ("tensor", "uniform") or self._walked(v) or v in here)
        used = {a for node in rest for a in values(node)} | set(later)
        return [node.out for node in self.trace.nodes if node.out in here and node.out in used]

    def _loop(
        self,
        sums: Sequence[tuple[Node, Value]],
        stores: Sequence[tuple[Value, str]],
        row: str,
        kept: Collection[Value] = (),
        keep: Sequence[Value] = (),
    ) -> list[str]:
        """One loop over the elements of a row: sums gathered, results stored, what is used again kept."""
        if not sums and not stores:
            return []
        single = [(n, v) for n, v in sums if n.out.kind != "column" and v.kind == "full"]
        direct = [(n, v) for n, v in sums if n.out.kind != "column" and v.kind == "row"]
        columns = [(n, v) for n, v in sums if n.out.kind == "column"]
        targets = [v for _, v in [*single, *columns]] + [v for v, _ in stores]
        stop = lambda v: v.kind in ("tensor", "uniform", "row") or self._walked(v) or v in kept
        nodes = self._slice(targets, stop)
        lines, body = [], []
        for value in self._leaves(nodes, targets):
            if value in kept:
                body.append(f"const {TYPES[value.dtype]} v{value.number} = k{value.number}[j];")
            elif value.kind == "full":
                body.append(self._load_full(value))
            elif value.kind == "column":
                body.append(self._load_column(value))
        body += [self._assign(node) for node in nodes]
        clauses = ""
        for node, value in single:
            kind = "double" if value.dtype == torch.float64 else "float"
            lines.append(f"{kind} s{node.out.number} = {_identity(node.op)};")
            body.append(_accumulate(node.op, f"s{node.out.number}", f"v{value.number}"))
            clauses += f" reduction({_clause(node.op)}:s{node.out.number})"
        for node, value in columns:
            body.append(_accumulate(node.op, f"q{node.out.number}[j]", f"v{value.number}"))
        body += [f"k{value.number}[j] = v{value.number};" for value in keep]
        body += [self._store(place, value, "base + j") for value, place in stores]
        if stores and self.clears is not None:
            body.append(f"a{self.clears}[base + j] = 0;")
        if body:
            lines += [f"#pragma omp simd{clauses}", "for (int64_t j = 0; j < n; j++) {", *body, "}"]
        for node, _ in single:
            if node.out.kind == "row":
                lines.append(
                    f"const {TYPES[node.out.dtype]} v{node.out.number} = {_finish(node.op, f's{node.out.number}', 'n')};"
                )
            else:
                lines.append(f"{self._partial(node, row)} = s{node.out.number};")
        for node, value in direct:
            lines.append(f"double s{node.out.number} = {_identity(node.op)};")
            lines.append(_accumulate(node.op, f"s{node.out.number}", f"v{value.number}"))
            lines.append(f"{self._partial(node, row)} = s{node.out.number};")
        return lines

    def _partial(self, node: Node, row: str) -> str:
        if self.flat:
            return f"scratch[({row}) * {self.num_sums} + {self._sum_place(node)}]"
        return f"part[r * {len(self.tensor_sums)} + {self.tensor_sums.index(node)}]"

    def _sum_place(self, node: Node) -> int:
        asked = [v for v, place in zip(self.trace.outputs, self.outputs) if place is None]
        return asked.index(node.out)

    def _combine(self, stage: int) -> list[str]:
        """After a walk: every thread adds the rows up in the same order, so that all know the same numbers."""
        lines = []
        for node in self.tensor_sums:
            if self.level[node.out] != stage + 1 or first_of(node).kind == "column":
                continue
            number, k = node.out.number, self.tensor_sums.index(node)
            origin = first_of(node)
            count = "R" if origin.kind == "row" else "size"
            partial = f"part[r * {len(self.tensor_sums)} + {k}]"
            added = _accumulate(_plain_sum(node.op), f"s{number}", partial)
            lines += [
                f"double s{number} = {_identity(node.op)};",
                f"for (int64_t r = 0; r < R; r++) {{ {added} }}",
                f"const {TYPES[node.out.dtype]} v{number} = {_finish(node.op, f's{number}', count)};",
            ]
        mine = [n for n in self.column_sums if self.level[n.out] == stage + 1]
        for node in mine:
            k, number = self.column_sums.index(node), node.out.number
            lines += [
                f"double *c{number} = wide + C * {k} * (crew + 1);",
                "for (int64_t j = C * tid / crew; j < C * (tid + 1) / crew; j++) {",
                f"double s = {_identity(node.op)};",
                f"for (int w = 0; w < crew; w++) {{ {_accumulate(_plain_sum(node.op), 's', f'c{number}[C * (1 + w) + j]')} }}",
                f"c{number}[j] = {_finish(node.op, 's', 'R')};",
                "}",
            ]
        if lines:
            lines.append("#pragma omp barrier")
        return lines

    def _epilogue(self) -> list[str]:
        """Columns and numbers of the parameter are stored when all rows are done."""
        columns = [(v, p) for v, p in zip(self.trace.outputs, self.outputs) if v.kind == "column" and p is not None]
        numbers = [
            (v, p)
            for v, p in zip(self.trace.outputs, self.outputs)
            if p is not None and p in [port.name for port in self.ports if port.kind == "tensor"]
        ]
        lines = []
        if self.num_sums:
            asked = [v for v, place in zip(self.trace.outputs, self.outputs) if place is None]
            lines += self._tensor_lines(self.last + 1)
            lines += ["if (tid == 0) {", *(f"sums[{k}] += v{v.number};" for k, v in enumerate(asked)), "}"]
        if columns:
            lines += ["if (tid == 0) for (int64_t j = 0; j < C; j++) {"]
            lines += self._column_lines([v for v, _ in columns])
            lines += [self._store(place, value, "j") for value, place in columns] + ["}"]
        if numbers:
            lines += ["if (tid == 0) {", *(self._store(place, value, "0") for value, place in numbers), "}"]
        return lines

    def _uniform_stores(self) -> list[str]:
        lines = []
        for value, place in zip(self.trace.outputs, self.outputs):
            if place in self.scalars:
                stored = self.trace.inputs[place].dtype
                lines.append(f"*({STORED[stored]} *)scalars[{self.scalars.index(place)}] = v{value.number};")
        return lines

    def _load_full(self, value: Value) -> str:
        name = self.named[value]
        if name == "index":
            return f"const int32_t v{value.number} = (int32_t)(firsts[i] + base) + (int32_t)j;"
        i = next(k for k, port in enumerate(self.ports) if port.name == name)
        return f"const {TYPES[value.dtype]} v{value.number} = {load(f'a{i}', 'base + j', value.dtype)};"

    def _store(self, place: str, value: Value, index: str) -> str:
        i = next(k for k, port in enumerate(self.ports) if port.name == place)
        dtype, text = self.ports[i].dtype, f"v{value.number}"
        if dtype == torch.bfloat16:
            text = f"bf16_store({text if value.dtype == torch.bfloat16 else f'bf16_round({text})'})"
        return f"a{i}[{index}] = ({STORED[dtype]}){text};"

    def _assign(self, node: Node) -> str:
        return f"const {TYPES[node.out.dtype]} v{node.out.number} = {expression(node, self.made)};"


def _plain_sum(op: str) -> str:
    return op if op in ("amax", "amin") else "sum"


def _identity(op: str) -> str:
    return {"amax": "-INFINITY", "amin": "INFINITY"}.get(op, "0")


def _clause(op: str) -> str:
    return {"amax": "max", "amin": "min"}.get(op, "+")


def _accumulate(op: str, name: str, value: str) -> str:
    if op == "amax":
        return f"{name} = {name} > {value} ? {name} : {value};"
    if op == "amin":
        return f"{name} = {name} < {value} ? {name} : {value};"
    return f"{name} += {value} * {value};" if "norm" in op else f"{name} += {value};"


def _finish(op: str, name: str, count: str) -> str:
    if op == "mean":
        return f"{name} / {count}"
    return f"sqrt({name})" if "norm" in op else name


def _lines(*groups: Sequence[str]) -> str:
    return "".join(f"    {line}\n" for group in groups for line in group)
