"""Blocks are found by what they hold, never across tenants, and reused oldest first; the scheduler never leaks one."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from llmo.engines.generation import Prompt, Sampling
from llmo.engines.paged.blocks import BLOCK, SCRATCH, Blocks, chain, salt
from llmo.engines.paged.scheduler import Scheduler
from llmo.engines.paged.stream import Piece, Stream
from llmo.engines.sampling import Sampler


def stream(id: int, ids: Sequence[int], tenant: str = "") -> Stream:
    return Stream(Prompt(id, ids, tenant=tenant), Sampler(Sampling(), ids), list(ids), len(ids), salt(tenant, None))


def test_a_key_names_the_tokens_everything_before_them_and_whose_they_are() -> None:
    tokens = list(range(BLOCK))
    keys = {
        chain(parent, part)
        for parent in (salt("a", None), salt("b", None), salt("a", "x"), salt("", "ax"), chain(salt("a", None), tokens))
        for part in (tokens, tokens[::-1])
    }
    assert len(keys) == 10


def test_a_block_is_shared_until_nobody_holds_it_and_found_until_it_is_reused() -> None:
    blocks = Blocks(4)
    taken = [blocks.take(), blocks.take()]
    assert SCRATCH not in taken
    blocks.publish(taken[0], b"first")
    blocks.publish(taken[1], b"second")
    assert blocks.share(b"first") == taken[0]
    blocks.release([taken[0]])
    blocks.release(taken)
    assert blocks.free == 3
    assert blocks.share(b"second") == taken[1]
    blocks.release([taken[1]])
    assert [blocks.take() for _ in range(3)] == [3, taken[0], taken[1]]  # never used, then the longest unused
    assert blocks.share(b"first") is None
    assert blocks.share(b"second") is None


def test_ends_of_a_stream_are_reused_before_its_beginning() -> None:
    blocks = Blocks(4)
    taken = [blocks.take() for _ in range(3)]
    blocks.release(taken)
    assert [blocks.take() for _ in range(3)] == taken[::-1]


def test_the_first_block_of_a_key_stays_the_one_that_is_found() -> None:
    blocks = Blocks(4)
    one, two = blocks.take(), blocks.take()
    blocks.publish(one, b"key")
    blocks.publish(two, b"key")
    assert blocks.share(b"key") == one
    blocks.release([two])
    while blocks.free:
        blocks.take()
    assert blocks.share(b"key") == one


def run(scheduler: Scheduler) -> list[Piece]:
    """A step whose every answer goes on with token 7."""
    pieces = scheduler.plan()
    for piece in pieces:
        assert len(piece.stream.blocks) * BLOCK >= piece.start + piece.count
        scheduler.computed(piece)
    for piece in pieces:
        if piece.last:
            piece.stream.ids.append(7)
    return pieces


def test_prompts_are_computed_by_the_chunk_beside_the_answers() -> None:
    scheduler = Scheduler(Blocks(20), streams=4, chunk=10, share_answers=True)
    short, long = stream(0, [1] * 4), stream(1, [2] * 25)
    scheduler.add(short)
    scheduler.add(long)
    steps = [[(p.stream.prompt.id, p.start, p.count) for p in run(scheduler)] for _ in range(4)]
    assert steps == [
        [(0, 0, 4), (1, 0, 6)],
        [(0, 4, 1), (1, 6, 10)],
        [(0, 5, 1), (1, 16, 9)],
        [(0, 6, 1), (1, 25, 1)],
    ]


def test_a_prefix_that_another_computes_is_taken_over_on_the_way() -> None:
    scheduler = Scheduler(Blocks(20), streams=4, chunk=16, share_answers=True)
    first, second = stream(0, [1] * 70), stream(1, [1] * 70)
    scheduler.add(first)
    scheduler.add(second)
    while second.pending > 1 or second.done < 70:
        run(scheduler)
    assert second.blocks[:4] == first.blocks[:4]
    assert second.cached == 64


def test_when_blocks_run_out_the_youngest_gives_way_and_comes_back() -> None:
    blocks = Blocks(6)
    scheduler = Scheduler(blocks, streams=4, chunk=64, share_answers=False)
    old, young = stream(0, [1] * 30, "a"), stream(1, [2] * 30, "b")
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(25):
        run(scheduler)
    assert scheduler.preempted == 1
    assert list(scheduler.waiting) == [young]
    assert young.blocks == []
    scheduler.remove(old)
    pieces = run(scheduler)
    assert [(p.stream, p.start, p.count) for p in pieces] == [(young, 16, 14)]  # the rest of its prompt
    assert run(scheduler)[0].start == 30
    scheduler.remove(young)
    assert blocks.free == blocks.usable


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=8),
    total=st.integers(9, 20),
    chunk=st.integers(1, 70),
    streams=st.integers(1, 5),
    share=st.booleans(),
    cancels=st.lists(st.integers(0, 40), max_size=3),
)
def test_every_stream_ends_and_every_block_comes_back(
    lengths: list[int], total: int, chunk: int, streams: int, share: bool, cancels: list[int]
) -> None:
    """Whatever comes: no block is held by two that do not share it, and none is lost."""
    blocks = Blocks(total)
    scheduler = Scheduler(blocks, streams, chunk, share)
    left = {i: stream(i, [i % 2] * min(n, (total - 2) * BLOCK)) for i, n in enumerate(lengths)}
    goal = {i: min(len(s.ids) + 20, (total - 1) * BLOCK) for i, s in left.items()}
    for one in left.values():
        scheduler.add(one)
    for step in range(3000):
        if not left:
            break
        pieces = run(scheduler)
        assert pieces
        assert sum(p.count for p in pieces if p.of_prompt) <= chunk
        assert len(scheduler.running) <= streams
        held = [(p.stream.blocks[at // BLOCK], at) for p in pieces for at in range(p.start, p.start + p.count)]
        assert len(set(held)) == len(held)
        for id in [id for id, one in left.items() if len(one.ids) >= goal[id] or (step in cancels and id == 0)]:
            scheduler.remove(left.pop(id))
    assert not left
    assert blocks.free == blocks.usable
