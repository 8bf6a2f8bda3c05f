"""Shared prefixes in the scheduler, without torch: what is found, and that no share is wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from cortexd.settings import Engine as EngineSettings
from engine.cache.block_pool import BlockPool
from engine.cache.kv_room import KVRoom
from engine.cache.prefix_cache import PrefixCache
from engine.cache.prefix_tree import PrefixTree
from engine.cache.slot_pool import SlotPool
from engine.cache.snapshots import Snapshots
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceState
from tests.engine.doubles import make_sequence
from tests.engine.kv_model import KVModel

BLOCK_SIZE = 8
NUMS_OF_SLOTS = (0, 3, 12)  # a dense model, and hybrids with few and with many states


def make_model(
    num_blocks: int = 64, context: int = 256, num_slots: int = 0, **fields: Any
) -> KVModel:
    """Return a checked memory and its scheduler over blocks of eight tokens; slots: a hybrid's."""
    fields = {"max_num_batched_tokens": 64, "max_prefill_chunk": 32, "max_num_seqs": 4, **fields}
    settings = EngineSettings(**fields)
    slots = SlotPool(num_slots) if num_slots else None
    room = KVRoom(BlockPool(num_blocks + 1), BLOCK_SIZE, 1000, slots, 300)
    return KVModel(Scheduler(settings, room, context))


def run(model: KVModel, *sequences: Sequence) -> list[int]:
    """Submit the sequences and run to the end; return how many tokens each had cached."""
    for sequence in sequences:
        model.scheduler.submit(sequence)
    while model.scheduler.has_work:
        model.step()
    assert model.scheduler.pool.num_used == 0
    return [sequence.num_cached_tokens for sequence in sequences]


def chat(length: int) -> list[int]:
    """Return a prompt in which no two blocks are equal."""
    return [position % 251 for position in range(length)]


def test_next_turn_reuses_the_prompt_and_the_answer() -> None:
    """All full blocks of what was computed are found, the last answer token was not."""
    model = make_model()
    first = make_sequence(chat(40), max_tokens=8)
    assert run(model, first) == [0]
    second = make_sequence(first.token_ids + chat(10), max_tokens=1)
    assert run(model, second) == [40]  # 47 tokens were computed: five full blocks


def test_equal_prompt_again_leaves_one_token_to_compute() -> None:
    """A prompt that is cached to its last token is computed from its last block on."""
    model = make_model()
    assert run(model, make_sequence(chat(32), max_tokens=1)) == [0]
    assert run(model, make_sequence(chat(32), max_tokens=1)) == [24]
    assert run(model, make_sequence(chat(33), max_tokens=1)) == [32]


def test_other_salt_finds_nothing() -> None:
    """Tenants share no prefix, whichever comes first, and keep their own."""
    model = make_model()
    for _ in range(2):
        cached = [
            run(model, make_sequence(chat(40), max_tokens=1, cache_salt=salt))
            for salt in ("", "a", "b")
        ]
    assert cached == [[32], [32], [32]]


def test_switched_off_finds_nothing() -> None:
    """Without the cache every prompt is computed."""
    model = make_model(prefix_cache=False)
    prompts = [make_sequence(chat(40), max_tokens=1) for _ in range(3)]
    assert run(model, *prompts) == [0, 0, 0]
    assert model.scheduler.pool.num_cached == 0


def test_equal_prompts_together_are_computed_once() -> None:
    """One computes, the others follow a step behind and take its blocks, partly shared ones too."""
    model = make_model()
    same = [make_sequence(chat(100), max_tokens=3, sequence_id=index) for index in range(3)]
    other = make_sequence([*chat(50), 0, 0, 0, 0, 0, 0, 0, 0], max_tokens=3, sequence_id=3)
    for sequence in (*same, other):
        model.scheduler.submit(sequence)
    num_computed = [model.step().num_tokens for _ in range(3)]
    # The shortest goes first and the others take its common blocks; then one of them computes.
    assert num_computed == [32, 26, 1 + 32]
    run(model)
    assert [sequence.num_cached_tokens for sequence in (*same, other)] == [48, 96, 96, 0]


def test_duplicate_of_a_published_block_gives_its_own_back() -> None:
    """Two sequences that computed the same block in one step hold one of the two."""
    model = make_model()
    pair = [make_sequence(chat(8), max_tokens=4, sequence_id=index) for index in range(2)]
    for sequence in pair:
        model.scheduler.submit(sequence)
    model.step()
    assert pair[0].block_table == pair[1].block_table
    assert model.scheduler.pool.num_used == 1


def test_preempted_sequence_finds_its_own_work_and_says_nothing() -> None:
    """What survives of its blocks is not computed again, nor told to the client as cached."""
    model = make_model(num_blocks=6, context=48)
    old, new = (make_sequence([token] * 20, max_tokens=20, sequence_id=token) for token in (1, 2))
    model.scheduler.submit(old)
    model.scheduler.submit(new)
    while not new.num_preemptions:
        model.step()
    starts = []
    while model.scheduler.has_work:
        starts += [row.start for row in model.step().rows if row.sequence is new]
    assert starts[0] > 0
    assert (old.num_cached_tokens, new.num_cached_tokens) == (0, 0)


def test_cancelled_prefill_leaves_its_finished_chunks() -> None:
    """What was computed before a client went away serves the next one."""
    model = make_model()
    gone = make_sequence(chat(100))
    model.scheduler.submit(gone)
    model.step()
    model.scheduler.finish(gone)
    assert run(model, make_sequence(chat(100), max_tokens=1)) == [32]


def test_step_that_failed_publishes_nothing() -> None:
    """Blocks of a step that ran out of memory are computed again by whoever comes next."""
    model = make_model()
    sequence = make_sequence(chat(100), max_tokens=1)
    model.scheduler.submit(sequence)
    assert model.step_without_memory() is None
    model.scheduler.finish(sequence)
    assert run(model, make_sequence(chat(100), max_tokens=1)) == [0]


def test_tainted_sequence_takes_its_prefix_along() -> None:
    """After logits that were not finite, no block that began alike is offered."""
    model = make_model()
    sequence = make_sequence(chat(40), max_tokens=9)
    longer = make_sequence(chat(60), max_tokens=9, sequence_id=2)
    model.scheduler.submit(longer)
    model.scheduler.submit(sequence)
    for _ in range(3):
        model.step()
    model.scheduler.finish(sequence, is_tainted=True)
    run(model)
    assert len(model.scheduler.prefix_cache.tree) == 0
    assert run(model, make_sequence(chat(60), max_tokens=1)) == [0]


def test_eviction_takes_the_least_recently_used_end_first() -> None:
    """The oldest conversation loses its last blocks before its first ones, the newest none."""
    model = make_model(num_blocks=16, context=128)
    first, second = [1] * 48, [2] * 48
    run(model, make_sequence(first, max_tokens=1))
    run(model, make_sequence(second, max_tokens=1))
    run(model, make_sequence([3] * 56, max_tokens=1))  # 4 of its 7 blocks were free
    assert run(model, make_sequence(second, max_tokens=1)) == [40]
    # Three blocks went to the third conversation, and one to the second's last block.
    assert run(model, make_sequence(first, max_tokens=1)) == [16]


def test_hybrid_goes_on_from_the_last_turn_mark() -> None:
    """Only at a cut there is a state, and only up to it blocks are kept."""
    model = make_model(num_slots=8)
    first = make_sequence(chat(45), max_tokens=4, stable_length=42)
    assert run(model, first) == [0]
    assert model.scheduler.pool.num_cached == 5
    assert run(model, make_sequence([*chat(42), 9, 9], max_tokens=1, stable_length=42)) == [40]
    assert run(model, make_sequence(chat(40), max_tokens=1, stable_length=40)) == [0]
    assert run(model, make_sequence([*chat(39), 9, 9], max_tokens=1, stable_length=39)) == [0]


def test_hybrid_answers_to_one_prompt_share_its_state() -> None:
    """One computes up to the cut, the others wait for its state and compute the rest."""
    model = make_model(num_slots=8, max_prefill_chunk=16)
    same = [
        make_sequence(chat(60), max_tokens=2, stable_length=57, sequence_id=index)
        for index in range(3)
    ]
    for sequence in same:
        model.scheduler.submit(sequence)
    # Chunks end at 16, 32, 48 and the cut at 56; then all have four tokens left.
    assert [model.step().num_tokens for _ in range(5)] == [16, 16, 16, 8, 12]
    run(model)
    assert [sequence.num_cached_tokens for sequence in same] == [0, 56, 56]


def test_hybrid_long_prompt_is_cut_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that leaves the common path in its middle goes on from a cut before."""
    monkeypatch.setattr("engine.cache.prefix_cache.SNAPSHOT_INTERVAL", 32)
    model = make_model(num_slots=8)
    assert run(model, make_sequence(chat(120), max_tokens=1, stable_length=119)) == [0]
    other = [*chat(80), 0, 0, 0, 0]
    assert run(model, make_sequence(other, max_tokens=1, stable_length=83)) == [64]


def test_hybrid_sequences_displace_snapshots_which_take_their_blocks_along() -> None:
    """Running comes first: the least recently used state goes, and the blocks only it needed."""
    model = make_model(num_slots=2)
    first, second = ([token] * 30 for token in (1, 2))
    run(model, make_sequence(first, max_tokens=1, stable_length=29))
    assert model.scheduler.pool.num_cached == 3
    run(model, make_sequence(second, max_tokens=1, stable_length=29))
    assert model.scheduler.pool.num_cached == 3
    assert run(model, make_sequence(second, max_tokens=1, stable_length=29)) == [24]
    assert run(model, make_sequence(first, max_tokens=1, stable_length=29)) == [0]


def test_hybrid_sequence_may_displace_the_very_snapshot_it_goes_on_from() -> None:
    """With no other slot left, the snapshot's own becomes the sequence's."""
    model = make_model(num_slots=2)
    run(model, make_sequence([1] * 30, max_tokens=1, stable_length=29))
    model.scheduler.submit(make_sequence([2] * 30, max_tokens=20))
    model.step()
    again = make_sequence([1] * 30, max_tokens=5)
    model.scheduler.submit(again)
    model.step()
    assert again.num_cached_tokens == 24
    assert repr(model.scheduler.snapshots) == "<Snapshots: 0, <SlotPool: 2 used, 0 free>>"
    run(model)


def test_tree_keeps_no_root_without_children() -> None:
    """Salts come from outside, so a salt without blocks must not stay."""
    tree = PrefixTree(2)
    node = tree.add(tree.root("a"), (1, 2), 5)
    assert tree.walk(tree.root("a"), [1, 2, 3, 4], 2) == [node]
    tree.remove(node)
    assert repr(tree) == "<PrefixTree: 0 blocks, 0 salts>"
    assert repr(node) == "<PrefixNode of 1 blocks, 0 children>"


def random_traffic(seed: int, num_slots: int = 0) -> None:
    """Conversations that branch, with cancels, failing steps and too few blocks for all."""
    rng = random.Random(seed)
    model = make_model(num_blocks=20, context=150, max_num_seqs=5, num_slots=num_slots)
    scheduler = model.scheduler
    histories = [[rng.randrange(3)] * rng.randrange(1, 30) for _ in range(4)]
    everything: list[Sequence] = []
    for step in range(150):
        if rng.random() < 0.4 and len(scheduler.waiting) < 3:
            prompt = rng.choice(histories)[: rng.randrange(1, 120)]
            prompt = prompt + [rng.randrange(2)] * rng.randrange(1, 25)
            sequence = make_sequence(
                prompt,
                max_tokens=rng.randrange(1, 6),
                sequence_id=step,
                cache_salt=rng.choice(["", "", "other"]),
                stable_length=rng.randrange(len(prompt)),
                num_prompt_logprobs=rng.choice([-1, -1, 0]),
            )
            scheduler.submit(sequence)
            everything.append(sequence)
        if not scheduler.has_work:
            continue
        if rng.random() < 0.05:
            victim = model.step_without_memory()
            if victim is not None:
                scheduler.finish(victim)
        elif rng.random() < 0.03:
            model.step_with_an_error()
        else:
            model.step()
        if rng.random() < 0.05:
            scheduler.finish(rng.choice(everything), is_tainted=rng.random() < 0.5)
        done = [each for each in everything if each.state is SequenceState.FINISHED]
        if done:
            histories[rng.randrange(4)] = rng.choice(done).token_ids
    while scheduler.has_work:
        model.step()
    assert scheduler.pool.num_used == 0
    assert scheduler.pool.num_cached == len(scheduler.prefix_cache.tree)
    assert scheduler.prefix_cache.num_hit_tokens > 0
    if scheduler.slots is not None and scheduler.snapshots is not None:
        assert scheduler.slots.num_used == len(scheduler.snapshots)


def all_traffic() -> None:
    """Run all seeds of the test below."""
    for seed in range(12):
        for num_slots in NUMS_OF_SLOTS:
            random_traffic(seed, num_slots)


@pytest.mark.parametrize("num_slots", NUMS_OF_SLOTS)
@pytest.mark.parametrize("seed", range(12))
def test_random_conversations_read_only_their_own_prefix(seed: int, num_slots: int) -> None:
    """Whatever is shared, evicted, cancelled or repeated, KV is that of the reader's tokens."""
    random_traffic(seed, num_slots)


def _ignore_last_token(patch: pytest.MonkeyPatch) -> None:
    real = PrefixTree.block_tokens
    patch.setattr(PrefixTree, "block_tokens", lambda *args: (*real(*args)[:-1], 0))


def _ignore_salt(patch: pytest.MonkeyPatch) -> None:
    real = PrefixTree.root
    patch.setattr(PrefixTree, "root", lambda self, _: real(self, ""))


def _publish_before_the_step(patch: pytest.MonkeyPatch) -> None:
    real = Scheduler.plan

    def plan(self: Scheduler) -> Any:
        planned = real(self)
        for row in planned.rows:
            before = row.sequence.num_computed
            row.sequence.num_computed = row.start + row.num_tokens
            self.prefix_cache.publish(row.sequence)
            row.sequence.num_computed = before
        return planned

    patch.setattr(Scheduler, "plan", plan)


def _forget_nothing_on_eviction(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixCache, "_evict", lambda self, block: self.pool.forget(block))


def _save_after_the_next_step(patch: pytest.MonkeyPatch) -> None:
    """As if a snapshot aliased the live state."""
    real = Snapshots.take_copies
    late: list[tuple[int, int]] = []

    def take_copies(self: Snapshots) -> list[tuple[int, int]]:
        due, late[:] = late.copy(), real(self)
        return due

    patch.setattr(Snapshots, "take_copies", take_copies)


def _publish_away_from_cuts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Snapshots, "__contains__", lambda *_: True)
    patch.setattr(Snapshots, "restore", lambda self, node, slot: slot or self.allocate())


def _skip_what_is_to_be_scored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sequence, "num_skippable", property(lambda self: len(self.token_ids) - 1))


def _share_without_a_reference(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "share", lambda self, blocks: None)


@pytest.mark.parametrize(
    "mutate",
    [
        _ignore_last_token,
        _ignore_salt,
        _publish_before_the_step,
        _forget_nothing_on_eviction,
        _share_without_a_reference,
        _save_after_the_next_step,
        _publish_away_from_cuts,
        _skip_what_is_to_be_scored,
    ],
)
def test_random_conversations_notice_a_broken_cache(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The property test above can fail: each broken mechanism is seen by some seed."""
    mutate(monkeypatch)
    with pytest.raises((AssertionError, KeyError)):
        all_traffic()
