"""The arithmetic of rows and processes, without processes."""

from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding import owners
from lightning_adapm.sharding.collectives import Pending, begin_and_wait
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.owners import Owners
from lightning_adapm.sharding.reduction import ProcessReduction
from lightning_adapm.sharding.rows import RowShard, column_range


@st.composite
def cuts(draw):
    """A parameter, one of its pieces, and the spans that processes hold: of whole rows, or cut anywhere."""
    groups, length, period = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(0, 4))
    start = draw(st.integers(0, period))
    rows, columns = groups * (length + period), draw(st.integers(1, 6))
    transposed = draw(st.booleans())
    whole = draw(st.booleans())
    shape = torch.Size((columns, rows) if transposed else (rows, columns))
    by_rows, size = draw(st.booleans()), draw(st.integers(2, 6))
    if by_rows:
        chunk = -(-shape[0] // size)
        edges = [min(chunk * index, shape[0]) * shape[1] for index in range(size + 1)]
    else:
        inner = draw(st.lists(st.integers(0, shape.numel()), min_size=size - 1, max_size=size - 1))
        edges = [0, *sorted(inner), shape.numel()]
    piece = Piece("mlp") if whole else Piece("query", start, start + length, groups, transposed=transposed)
    return shape, piece, tuple(pairwise(edges))


def shards_of(shape, piece, spans):
    layouts = [Layout(shape, spans, rank, rank) for rank in range(len(spans))]
    return [RowShard(layout, piece.start, piece.stop, piece.groups, piece.transposed) for layout in layouts]


@settings(max_examples=1000, deadline=None)
@given(cuts())
def test_the_parts_are_the_matrix(case):
    shape, piece, spans = case
    param = torch.arange(1.0, shape.numel() + 1).view(shape)
    matrix = piece.matrix(param)
    total, owned = torch.zeros_like(matrix), torch.zeros(matrix.shape[0])
    for (first, last), shard in zip(spans, shards_of(shape, piece, spans), strict=True):
        assert (shard.size, shard.width) == matrix.shape
        rows = shard.take(param.flatten()[first:last]).flatten(1)
        assert rows.shape == (shard.count, shard.width)
        assert shard.count <= shard.most
        total[shard.first : shard.first + shard.count] += rows
        assert shard.numel == rows.count_nonzero()
        assert torch.equal(shard.held_only(rows), rows)
        owned[shard.first + (not shard.owns_first) : shard.first + shard.count] += 1
        for row in range(shard.first, shard.first + shard.count):
            held = torch.equal(rows[row - shard.first], matrix[row])
            assert held or row in shard.cut
    assert torch.equal(total, matrix)
    assert (owned == 1).all()


@settings(max_examples=200, deadline=None)
@given(cuts())
def test_what_is_put_back_changes_the_piece_alone(case):
    shape, piece, spans = case
    param = torch.arange(1.0, shape.numel() + 1).view(shape)
    expected = param.clone()
    piece.view(expected).mul_(-1)
    flat = param.flatten().clone()
    for (first, last), shard in zip(spans, shards_of(shape, piece, spans), strict=True):
        part = flat[first:last]
        rows = shard.take(part)
        part.abs_()  # as another piece's update, between the two
        rows.mul_(-1)
        shard.put(part, rows)
    assert torch.equal(flat.view(shape), expected)


@given(st.integers(1, 40), st.integers(1, 12))
def test_columns_are_shared_out_as_a_dtensor_does(n, size):
    spans = tuple((0, 0) for _ in range(size))
    ranges = [column_range(Layout(torch.Size((1, n)), spans, rank, None), n) for rank in range(size)]
    chunks = torch.arange(n).chunk(size)
    for index, (first, last) in enumerate(ranges):
        assert list(range(first, last)) == (chunks[index].tolist() if index < len(chunks) else [])


def test_gathered_columns_lie_without_gaps(monkeypatch):
    """As kernels read them, also where the number of processes does not divide the columns."""
    whole, sent = [torch.arange(30.0).view(2, 3, 5), torch.arange(12.0).view(1, 3, 4)], []

    def reduction_of(rank):
        layout = Layout(torch.Size((6, 5)), ((0, 15), (15, 30)), rank, "both")
        return ProcessReduction([RowShard(layout)], columns_shared=True)

    def exchanged(into, part, group, async_op):
        sent.append(part)
        into.copy_(torch.cat([sent[0], sent[-1]]))
        return SimpleNamespace(wait=lambda: None)

    for name in ("all_gather_into_tensor", "all_gather_single"):  # until and since torch 2.13
        monkeypatch.setattr(f"torch.distributed.{name}", exchanged, raising=False)
    for rank in range(2):  # what the first has sent is there when the second asks
        reduction = reduction_of(rank)
        found = reduction.columns_of([reduction.kept_columns(each) for each in whole], [5, 4])
    assert all(torch.equal(one, other) and one.is_contiguous() for one, other in zip(found, whole, strict=True))


class Mail:
    """Exchanges between processes that are all in this one: each is delivered to whoever waits for it."""

    def __init__(self):
        self.sent = defaultdict(list)

    def exchange(self, received, sent, taken, given, group, async_op):
        """``group`` is the number of the process."""
        place = len(self.sent[group])
        self.sent[group].append(sent.split(given))
        return SimpleNamespace(wait=lambda: self._deliver(received, taken, group, place))

    def _deliver(self, received, taken, process, place):
        for source, rows in enumerate(received.split(taken)):
            rows.copy_(self.sent[source][place][process])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts(), st.integers(1, 7), st.booleans(), st.booleans())
def test_each_matrix_is_worked_on_by_one_process(monkeypatch, case, number, large, together):
    """Rows come back to where they were, of matrices that have exchanges of their own and of those that share one."""
    shape, piece, spans = case
    monkeypatch.setattr(owners, "LARGE", 1 if large else 1 << 30)
    monkeypatch.setattr("torch.distributed.all_to_all_single", Mail().exchange)
    params = [torch.randn(shape) for _ in range(number)]
    matrices = torch.stack([piece.matrix(param) for param in params])
    parts, dealt = [], []
    for (first, last), shard in zip(spans, shards_of(shape, piece, spans), strict=True):
        rows = torch.stack([shard.take(param.flatten()[first:last]).flatten(1) for param in params])
        parts.append(rows if together else list(rows))
        dealt.append(Owners([shard] * number, torch.float32))
    wholes = exchanged([each.collect(rows) for each, rows in zip(dealt, parts, strict=True)])
    assert torch.equal(torch.cat([each.mine(matrices) for each in dealt]), torch.cat(wholes))
    assert max(map(len, wholes)) - min(map(len, wholes)) <= max(1, number // len(spans) if large else 1)
    results = [whole.mT.contiguous().mT + 1 for whole in wholes]
    found = exchanged(
        [
            each.give_back(result, rows if together else None)
            for each, result, rows in zip(dealt, results, parts, strict=True)
        ]
    )
    for rows, shard in zip(found, shards_of(shape, piece, spans), strict=True):
        for held, matrix in zip(rows, matrices, strict=True):
            assert torch.equal(held, matrix[shard.first : shard.first + shard.count] + 1)


def exchanged(planned):
    """What all processes have after their exchanges."""
    pending = [Pending(each) for each, _ in planned]
    for each in pending:
        begin_and_wait(each, None)
    for each in pending:
        begin_and_wait(None, each)
    return [finish() for _, finish in planned]
