"""Decides what the next step computes: a token of every answer, then prompts by the chunk, as far as blocks reach."""

from __future__ import annotations

from collections import deque

from llmo.engines.paged.blocks import Blocks
from llmo.engines.paged.stream import Piece, Stream


class Scheduler:
    """Streams wait in order of arrival, at most `streams` run, and together they compute at most `chunk` tokens
    a step beside one token of each answer. When blocks run out the youngest goes back in line and computes again."""

    def __init__(self, blocks: Blocks, streams: int, chunk: int, share_answers: bool) -> None:
        self._blocks = blocks
        self._size = blocks.size
        self._streams = streams
        self._chunk = chunk
        self._share_answers = share_answers
        self.waiting: deque[Stream] = deque()
        self.running: list[Stream] = []  # oldest first
        self.preempted = 0

    def add(self, stream: Stream) -> None:
        self.waiting.append(stream)

    def plan(self) -> list[Piece]:
        """The pieces of the next step, with blocks for all of them; empty only when no stream is left."""
        left = self._chunk
        pieces: list[Piece] = []
        preempted = self.preempted
        for stream in list(self.running):
            if stream in self.running and (stream.decoding or left):
                piece = self._piece(stream, left)
                if piece is not None:
                    pieces.append(piece)
                    left -= 0 if stream.decoding else piece.count
        while left and self.waiting and len(self.running) < self._streams and preempted == self.preempted:
            stream = self.waiting[0]
            self._match(stream)
            if self._missing(stream) + sum(self._missing(other) for other in self.running) > self._blocks.free:
                self._free(stream)
                break
            self.running.append(self.waiting.popleft())
            piece = self._piece(stream, left)
            if piece is None:
                break
            pieces.append(piece)
            left -= piece.count
        return pieces

    def spare(self, stream: Stream, count: int) -> int:
        """Take blocks for `count` tokens after the stream's own, but none that a running stream may need for its next;
        for how many there is room."""
        need = -(-(len(stream.ids) + count) // self._size) - len(stream.blocks)
        stream.blocks += [self._blocks.take() for _ in range(min(need, self._blocks.free - len(self.running)))]
        return min(count, len(stream.blocks) * self._size - len(stream.ids))

    def computed(self, piece: Piece) -> None:
        """Note that a piece's keys and values are in the cache, and let others find its full blocks."""
        stream = piece.stream
        first, stream.done = piece.start // self._size, piece.start + piece.count
        shared = stream.done if self._shares_answer(stream) else min(stream.done, stream.asked)
        for index in range(first, shared // self._size):
            self._blocks.publish(stream.blocks[index], stream.key_of(index))

    def remove(self, stream: Stream) -> None:
        """Forget a stream that ended, failed or was cancelled; its blocks are free at once."""
        if stream in self.running:
            self.running.remove(stream)
        else:
            self.waiting.remove(stream)
        self._free(stream)

    def _piece(self, stream: Stream, left: int) -> Piece | None:
        """The next tokens of a running stream, at most `left` unless it decodes; None when it had to give way."""
        self._match(stream)
        count = stream.pending if stream.decoding else min(stream.pending, left)
        if stream.done < stream.asked:
            count = min(count, stream.asked - stream.done)
        need = -(-(stream.done + count) // self._size) - len(stream.blocks)
        while need > self._blocks.free:
            victim = self.running.pop()
            self._free(victim)
            self.waiting.appendleft(victim)
            self.preempted += 1
            if victim is stream:
                return None
        stream.blocks += [self._blocks.take() for _ in range(need)]
        return Piece(stream, stream.done, count)

    def _match(self, stream: Stream) -> None:
        """Take over full blocks that hold the stream's next tokens already; the last token is always computed."""
        limit = len(stream.ids) - 1
        if not self._shares_answer(stream):
            limit = min(limit, stream.asked)
        while stream.done == len(stream.blocks) * self._size and stream.done + self._size <= limit:
            block = self._blocks.share(stream.key_of(stream.done // self._size))
            if block is None:
                return
            stream.blocks.append(block)
            stream.done += self._size
            if len(stream.ids) == stream.asked:
                stream.cached += self._size

    def _shares_answer(self, stream: Stream) -> bool:
        """With an adapter, tokens of an answer are not computed as those of a prompt are."""
        return self._share_answers and stream.adapter is None

    def _missing(self, stream: Stream) -> int:
        """Blocks it still lacks for the tokens it has now."""
        return max(0, -(-len(stream.ids) // self._size) - len(stream.blocks))

    def _free(self, stream: Stream) -> None:
        self._blocks.release(stream.blocks)
        stream.blocks.clear()
        stream.done = 0
        if len(stream.ids) == stream.asked:
            stream.cached = 0
