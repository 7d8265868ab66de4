"""How quantized weights are stored: codes, and numbers that a group of them shares. Figures only."""

from dataclasses import dataclass
from enum import Enum
from functools import cache
from math import ceil, prod

from zi_experiments.config.schema import Quant


class Code(Enum):
    """What a code means."""

    asymmetric = "asymmetric"  # an integer, divided by the group's scale, plus its minimum
    e4m3 = "e4m3"  # a number of 4 bits of exponent and 3 of mantissa, times the group's scale
    e2m1 = "e2m1"  # the same of 2 and 1
    signed = "signed"  # an integer from −2^(bits−1) on, stored without a sign, times the group's scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """The codes of a matrix lie row after row, and so do the groups that it is divided into."""

    name: str
    code: Code
    bits: int  # of a code
    group: tuple[int, int]  # rows and columns of the codes that share numbers; those at an edge may be fewer
    # bytes of each number of a group: a scale and, of asymmetric codes, a minimum. One byte is an exponent of 2, two are a
    # number of the run's 16-bit type, four are a float32
    numbers: tuple[int, ...]

    @property
    def group_numel(self) -> int:
        """Codes of a whole group."""
        return self.group[0] * self.group[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How one parameter is stored in a format."""

    format: Format
    parts: int = 1  # matrices that its rows consist of, each with groups of its own
    transposed: bool = False  # whether its codes are those of the transposed matrix

    def codes(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return the matrices, and the rows and columns of codes of each, that a parameter of this shape has."""
        rows, columns = shape[:-3:-1] if self.transposed else shape[-2:]
        return prod(shape[:-2]) * self.parts, rows // self.parts, columns

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return the groups in a column and in a row of each matrix of a parameter of this shape."""
        _, rows, columns = self.codes(shape)
        return ceil(rows / self.format.group[0]), ceil(columns / self.format.group[1])

    def groups(self, shape: tuple[int, ...]) -> int:
        """Return the number of groups of a parameter of this shape."""
        return self.codes(shape)[0] * prod(self.grid(shape))

    def undivided(self, shape: tuple[int, ...]) -> int | None:
        """Return the columns of codes if groups in a row do not divide them, else None. Blocks may be smaller at an edge."""
        columns = self.codes(shape)[2]
        return columns if self.format.group[0] == 1 and columns % self.format.group[1] else None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes that such a parameter takes: packed codes, and the numbers of its groups."""
        return prod(self.codes(shape)) * self.format.bits // 8 + self.groups(shape) * sum(self.format.numbers)


@cache
def _groupwise(bits: int, group_size: int, group_dim: int) -> Packing:
    group = (1, group_size) if group_dim == 1 else (group_size, 1)
    return Packing(format=Format(name=f"INT{bits}", code=Code.asymmetric, bits=bits, group=group, numbers=(2, 2)))


def groupwise(quant: Quant) -> Packing:
    """Return DeepSpeed's format, in which any matrix can be stored that its groups divide."""
    assert quant.group_size is not None
    assert quant.group_dim is not None
    assert quant.bits is not None
    return _groupwise(quant.bits, quant.group_size, quant.group_dim)
