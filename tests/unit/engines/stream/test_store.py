"""Slabs come back as they were written, in the order of the layers and round and round, or not at all."""

import os
import random
import resource
import threading
import time
from itertools import product

import pytest
import torch

from zi_experiments.engines.stream.expert_pool import Pool
from zi_experiments.engines.stream.host_cache import HostCache, OnDisk
from zi_experiments.engines.stream.ring import InPlace, Ring, Shares
from zi_experiments.engines.stream.slab import PAGE
from zi_experiments.engines.stream.store import DirectFile, Store
from zi_experiments.engines.stream.stripes import STRIPE_BYTES, Striped, open_files
from zi_experiments.runtime.pinned_memory import host_empty

SIZES = [7 * PAGE, 3 * PAGE, PAGE, 12 * PAGE, 5 * PAGE]  # of slabs; the layers of a model differ too
ROUNDS = 4


def slab_of(index):
    """Bytes that no other slab has."""
    return torch.randint(0, 256, (SIZES[index],), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)


def pages(nbytes):
    return host_empty(nbytes, torch.uint8, pinned=False)


def written(file, indices):
    """The offsets of these slabs, once they are in the file."""
    offsets, offset = {}, 0
    for index in indices:
        buffer = pages(SIZES[index])
        buffer.copy_(slab_of(index))
        for part in file.write(buffer, offset):
            part.result()
        offsets[index] = offset
        offset += SIZES[index]
    return offsets


@pytest.fixture
def store_of(tmp_path):
    """`store_of(on_disk, chunk_bytes, parallel, buffers)` → the store of all slabs, of which some are on disk."""
    stores = []

    def store_of(on_disk, chunk_bytes=PAGE, parallel=3, buffers=2):
        file = None
        if on_disk:
            nbytes = sum(SIZES[index] for index in on_disk)
            file = DirectFile(str(tmp_path / "rank0"), nbytes, chunk_bytes, parallel, buffers)
        offsets = written(file, on_disk) if on_disk else {}
        slabs = [offsets.get(index, slab_of(index)) for index in range(len(SIZES))]
        store = Store(slabs, file, [pages(max(SIZES)) for _ in range(buffers)] if on_disk else [])
        store.start(SIZES)
        stores.append(store)
        return store

    yield store_of
    for store in stores:
        store.close()


@pytest.mark.parametrize("on_disk", [[], [0, 1, 2, 3, 4], [1, 3], [4]], ids=str)
@pytest.mark.parametrize(("chunk_bytes", "parallel", "buffers"), [(PAGE, 3, 1), (2 * PAGE, 1, 2), (None, None, 4)])
def test_slabs_come_back_round_and_round(store_of, on_disk, chunk_bytes, parallel, buffers):
    store = store_of(on_disk, chunk_bytes, parallel, buffers)

    for _, index in product(range(ROUNDS), range(len(SIZES))):
        slab = store.take(index)
        assert torch.equal(slab, slab_of(index)), index
        if index in on_disk:
            slab.fill_(0xAA)  # it is read anew: nothing of the last round is left in a buffer
        store.hand_back(index, None)


def test_a_buffer_is_not_read_into_before_it_is_handed_back(store_of):
    """One buffer and two slabs on disk: the second can only come once the first has left."""
    store = store_of([1, 3], buffers=1)
    slab = store.take(1)

    assert torch.equal(slab, slab_of(1))
    assert not store._reads, "nothing is under way"
    store.hand_back(1, None)
    assert torch.equal(store.take(3), slab_of(3))


def test_a_read_waits_for_what_still_uses_its_buffer(tmp_path):
    """As a copy to the device does, after `hand_back`: `after` returns when it is done."""
    file = DirectFile(str(tmp_path / "rank0"), SIZES[0], PAGE, 2, 1)
    offsets = written(file, [0])
    buffer, done = pages(SIZES[0]), threading.Event()
    buffer.zero_()

    parts = file.read(buffer, offsets[0], lambda: done.wait(10))
    time.sleep(0.1)  # far longer than to read it takes
    assert not any(part.done() for part in parts)
    assert not buffer.any()
    done.set()
    for part in parts:
        part.result(10)
    assert torch.equal(buffer, slab_of(0))
    file.close()


def test_a_file_that_is_there_already_is_not_overwritten(tmp_path):
    (tmp_path / "rank0").write_text("somebody else's")

    with pytest.raises(FileExistsError):
        DirectFile(str(tmp_path / "rank0"), PAGE, None, None, 1)
    assert (tmp_path / "rank0").read_text() == "somebody else's"


@pytest.fixture
def small_files():
    """No file of this process may have more than a MiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # Python ignores SIGXFSZ
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_finds_no_room_leaves_nothing(small_files, tmp_path):
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="File too large"):
        DirectFile(str(tmp_path / "rank0"), 2 << 20, None, None, 1)

    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_close_removes_the_file_and_its_threads(store_of, tmp_path):
    before = threading.active_count()
    store = store_of([0, 1])
    assert (tmp_path / "rank0").stat().st_size == SIZES[0] + SIZES[1]
    assert threading.active_count() > before

    store.close()

    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before
    store.close = lambda: None


def test_a_file_that_is_cut_off_is_an_error(store_of, tmp_path):
    store = store_of([0, 1, 2, 3, 4], buffers=1)
    (tmp_path / "rank0").open("r+b").truncate(SIZES[0] + PAGE)
    assert torch.equal(store.take(0), slab_of(0))  # it was read before
    store.hand_back(0, None)

    with pytest.raises(OSError, match=rf"preadv moved 0 bytes at {SIZES[0] + PAGE} of the file of weights"):
        store.take(1)


# --- several drives -------------------------------------------------------------------------------------------------

LARGE = 10 * STRIPE_BYTES + 5 * PAGE


@pytest.fixture
def striped(tmp_path):
    """`striped(drives, **settings)` → a file of `LARGE` bytes in as many folders, and random bytes that it holds."""
    opened = []

    def striped(drives, chunk_bytes=None, parallel=None):
        folders = [tmp_path / f"drive{number}" for number in range(drives)]
        for folder in folders:
            folder.mkdir()
        file = open_files([str(folder / "rank0") for folder in folders], LARGE, chunk_bytes, parallel, 2)
        opened.append(file)
        content = pages(LARGE)
        content.copy_(torch.randint(0, 256, (LARGE,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
        for part in file.write(content, 0):
            part.result()
        return file, content

    yield striped
    for file in opened:
        file.close()
    assert not list(tmp_path.glob("*/*")), "closing removes every file"


@pytest.mark.parametrize(("chunk_bytes", "parallel"), [(None, None), (3 * PAGE, 3), (4 * STRIPE_BYTES, 1)])
@pytest.mark.parametrize("drives", [1, 2, 3])
def test_any_part_of_a_file_in_stripes_is_read_as_it_was_written(striped, drives, chunk_bytes, parallel):
    file, content = striped(drives, chunk_bytes, parallel)
    # whole; within a stripe; over the end of one; many of them; to the end
    ends = [(0, LARGE), (PAGE, 3 * PAGE), (STRIPE_BYTES - PAGE, STRIPE_BYTES + PAGE)]
    for start, end in [*ends, (3 * PAGE, LARGE - PAGE), (7 * STRIPE_BYTES, LARGE)]:
        buffer = pages(end - start)
        for read in (file.read, file.read_part):
            buffer.zero_()
            for part in read(buffer, start, lambda: None):
                part.result()
            assert torch.equal(buffer, content[start:end]), (start, end)


def test_stripes_go_to_the_drives_in_turn(striped, tmp_path):
    _, content = striped(3)
    on_drive = [(tmp_path / f"drive{number}" / "rank0").read_bytes() for number in range(3)]

    for number in range(LARGE // STRIPE_BYTES):
        begin = number // 3 * STRIPE_BYTES
        stripe = content[number * STRIPE_BYTES :][:STRIPE_BYTES]
        assert on_drive[number % 3][begin : begin + STRIPE_BYTES] == bytes(stripe.numpy()), number


def test_a_drive_without_room_leaves_no_file_on_the_others(small_files, tmp_path):
    """The first would have two of three stripes, and no file may have more than one; then the second cannot be made."""
    paths = [str(tmp_path / f"rank{number}") for number in range(2)]
    open_before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(OSError, match=f"no room .* in {paths[0]} .*File too large"):
        Striped(paths, 3 * STRIPE_BYTES, None, None, 1)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        Striped([paths[0], str(tmp_path / "missing" / "rank0")], 2 * STRIPE_BYTES, None, None, 1)
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == open_before


# --- sources --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in place", "ring of 2", "ring of 3", "ring of 8"])
def source_of(request):
    def source_of(store):
        if request.param == "in place":
            return InPlace(store)
        return Ring(store, int(request.param.split()[-1]), torch.device("cpu"))

    return source_of


@pytest.mark.parametrize("on_disk", [[], [0, 1, 2, 3, 4], [1, 3]], ids=str)
@pytest.mark.parametrize("buffers", [1, 4])
def test_a_layer_is_given_its_own_slab_in_every_pass(store_of, source_of, on_disk, buffers):
    source = source_of(store_of(on_disk, buffers=buffers))

    for _, index in product(range(ROUNDS), range(len(SIZES))):
        assert torch.equal(source.take(index), slab_of(index)), index
        source.hand_back()


def test_a_slab_stays_while_its_layer_computes(store_of):
    """All that could come meanwhile has come: into other slots."""
    ring = Ring(store_of([]), 3, torch.device("cpu"))
    slab = ring.take(0)

    assert ring._sent == 3
    ring._send()
    assert ring._sent == 3
    assert torch.equal(slab, slab_of(0))
    ring.hand_back()
    assert ring._sent == 4


@pytest.fixture
def alone(tmp_path):
    """A group of one rank: what it gathers is its own share."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("on_disk", [[], [0, 1, 2, 3, 4], [1, 3]], ids=str)
def test_shares_come_while_slabs_wait_for_their_layers(store_of, alone, on_disk):
    """Two slabs are gathered, and three shares beyond them are there: the links never wait for a gather."""
    shares = Shares(store_of(on_disk), 3, torch.device("cpu"))
    ring = Ring(shares, 2, torch.device("cpu"), group=alone)

    for turn, (_, index) in enumerate(product(range(ROUNDS), range(len(SIZES)))):
        assert torch.equal(ring.take(index), slab_of(index)), index
        assert ring._sent == turn + 2
        assert on_disk or shares._ring._sent == turn + 2 + 3
        ring.hand_back()


IN_STEPS = [1, 2, 4]  # slabs that a decode step takes: the host computes the layers of the others
LONG = [0, 1, 2, 3, 4]


@pytest.mark.parametrize("slots", [None, 2, 3, 8], ids=str)
@pytest.mark.parametrize("in_steps", [IN_STEPS, [0, 3], [], LONG], ids=str)
def test_decode_steps_take_fewer_slabs(store_of, slots, in_steps):
    """Whatever follows: what was sent ahead for another pass is not taken for a slab of this one."""
    store = store_of([])
    source = Ring(store, slots, torch.device("cpu"), in_steps=in_steps) if slots else InPlace(store, in_steps)

    for is_step in (False, True, True, False, False, True, False):
        for index in in_steps if is_step else LONG:
            assert torch.equal(source.take(index, is_step=is_step), slab_of(index)), (is_step, index)
            source.hand_back()


def test_slabs_of_the_next_step_are_sent_ahead(store_of):
    ring = Ring(store_of([]), 3, torch.device("cpu"), in_steps=IN_STEPS)
    for index in LONG:
        ring.take(index, is_step=False)
        ring.hand_back()

    assert [ring._schedule.index(number) for number in range(ring._computed, ring._sent)] == IN_STEPS
    sent = ring._sent
    ring.take(1, is_step=True)
    assert ring._sent == sent


def test_a_step_out_of_turn_is_an_error(store_of):
    ring = Ring(store_of([]), 2, torch.device("cpu"), in_steps=IN_STEPS)

    with pytest.raises(RuntimeError, match="layer 0 runs instead of layer 1"):
        ring.take(0, is_step=True)


@pytest.mark.parametrize("order", [[1], [0, 2], [0, 1, 2, 3, 4, 4], [0, 0]], ids=str)
def test_layers_that_run_out_of_turn_are_an_error(store_of, order):
    ring = Ring(store_of([]), 2, torch.device("cpu"))
    for index in order[:-1]:
        ring.take(index)
        ring.hand_back()

    with pytest.raises(RuntimeError, match=f"layer {order[-1]} runs instead of layer"):
        ring.take(order[-1])


# --- single experts -------------------------------------------------------------------------------------------------

EXPERTS = {0: (PAGE, 3), 3: (3 * PAGE, 3)}  # by slab: first byte and number of its experts, of two pages each


def expert_of(slab, expert):
    start, _ = EXPERTS[slab]
    return slab_of(slab)[start + 2 * expert * PAGE :][: 2 * PAGE]


@pytest.fixture
def cache_of(store_of):
    """`cache_of(slots)` → a cache of experts on disk, which are counted from the first slab that has some."""

    def cache_of(slots, **settings):
        places = [
            OnDisk(slab=slab, start=start, nbytes=2 * PAGE, count=count) for slab, (start, count) in EXPERTS.items()
        ]
        cache = HostCache(places, pages(slots * 2 * PAGE).view(slots, -1), slots, **settings)
        cache.attach(store_of([0, 1, 2, 3, 4]))
        return cache

    return cache_of


@pytest.mark.parametrize("slots", [1, 2, 4, 6])
def test_experts_come_as_they_were_written(cache_of, slots):
    cache = cache_of(slots)
    for layer, experts in product((0, 1, 0), ([1], [0, 2], [0, 1, 2])):
        for group in cache.bring(layer, experts):
            for expert, row in zip(group.experts, group.rows, strict=True):
                assert torch.equal(group.slabs[row], expert_of(list(EXPERTS)[layer], expert))
    assert cache.read_bytes == cache.read * 2 * PAGE
    if slots == 6:
        assert cache.read == 6, "each once"


@pytest.mark.parametrize(("slots", "cached"), [(2, 5), (3, 4), (2, 3), (2, 2)])
def test_what_leaves_the_device_comes_back_to_host_memory(cache_of, slots, cached):
    """An expert is in one of both memories: with room for all, and for one that is under way, each is read once."""
    cache = cache_of(cached, saves=True)
    pool = Pool(cache, slots, 2, torch.device("cpu"))
    order = random.Random(0)
    turns = [(order.randrange(2), sorted(order.sample(range(3), order.choice((1, 2))))) for _ in range(60)]
    for layer, experts in turns:
        for group in pool.bring(layer, experts):
            for expert, row in zip(group.experts, group.rows, strict=True):
                assert torch.equal(group.slabs[row], expert_of(list(EXPERTS)[layer], expert))
        both = [{(layer, expert) for layer in (0, 1) for expert in each._slots.of(layer)} for each in (pool, cache)]
        assert not both[0] & both[1]
    if slots + cached > 6:
        assert cache.read == 6
    else:
        assert 6 < cache.read < pool.copied


class Busy:
    """A stream whose operations take until `done` is set; it is its own event."""

    def __init__(self):
        self.done = threading.Event()

    def record_event(self):
        return self

    def synchronize(self):
        assert self.done.wait(10)


def test_an_expert_that_is_being_copied_is_not_read_over(cache_of):
    cache, stream = cache_of(1), Busy()
    cache.prepare(0, [0])
    slot = cache.take(0, 0)
    cache.hand_back(0, 0, stream)
    cache.prepare(0, [1])
    time.sleep(0.1)  # far longer than to read it takes
    assert not cache.is_ready(0, 1)
    assert torch.equal(slot, expert_of(0, 0))
    stream.done.set()
    assert torch.equal(cache.take(0, 1), expert_of(0, 1))


def test_a_slot_whose_read_nobody_waited_for_is_not_kept(cache_of, tmp_path):
    """As after a pass that was broken off: neither what was there, nor half of what was to come."""
    cache = cache_of(2)
    file = tmp_path / "rank0"
    content = file.read_bytes()
    file.open("r+b").truncate(0)
    cache.prepare(0, [0, 1])
    assert cache.kept(0) == []
    with pytest.raises(OSError, match="preadv moved 0 bytes"):
        cache.take(0, 0)
    with pytest.raises(OSError, match="preadv moved 0 bytes"):
        cache.take(0, 0)
    file.write_bytes(content)
    cache.prepare(1, [0, 1])
    assert torch.equal(cache.take(1, 1), expert_of(3, 1))
    assert [start for start, _ in cache.kept(3)] == [5 * PAGE]


@pytest.mark.parametrize("buffers", [1, 2, 4])
def test_what_is_kept_in_memory_is_not_read_and_nothing_is_read_for_the_next_pass(tmp_path, buffers):
    file = DirectFile(str(tmp_path / "rank0"), sum(SIZES), PAGE, 3, buffers)
    offsets = written(file, range(len(SIZES)))
    kept = {0: [(2 * PAGE, PAGE), (4 * PAGE, 3 * PAGE)], 2: [(0, PAGE)], 3: [(0, 5 * PAGE)]}

    def in_memory(index):
        return [(start, torch.full((nbytes,), 7, dtype=torch.uint8)) for start, nbytes in kept.get(index, [])]

    store = Store(
        list(offsets.values()), file, [pages(max(SIZES)) for _ in range(buffers)], wraps=False, kept=in_memory
    )
    store.start(SIZES)
    for _, index in product(range(ROUNDS), range(len(SIZES))):
        expected = slab_of(index)
        for start, nbytes in kept.get(index, []):
            expected[start : start + nbytes] = 7
        if index == 0:
            assert not store._reads
        assert torch.equal(store.take(index), expected), index
        store.hand_back(index, None)
    store.close()
