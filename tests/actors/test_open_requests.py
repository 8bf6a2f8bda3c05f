"""What a killed front leaves of its requests is read back, and only that."""

from __future__ import annotations

from pathlib import Path

from actors.open_requests import OpenRequest, OpenRequests, open_requests_path, take_left


def request(number: int, model: str = "m") -> OpenRequest:
    """Return one of several requests."""
    return OpenRequest(f"r{number}", "/v1/chat/completions", model, "here")


def opened(folder: Path, incarnation: int = 1) -> OpenRequests:
    """Return the entries of a front."""
    return OpenRequests(open_requests_path(folder, "front.0", incarnation))


def test_what_was_not_ended_is_left_and_taken_once(tmp_path: Path) -> None:
    """An ended one is gone, an updated one is as it was last, the file goes with the reading."""
    front = opened(tmp_path)
    slots = [front.begin(request(number)) for number in range(3)]
    front.end(slots[1])
    front.update(slots[2], request(2, "other"))
    assert take_left(tmp_path, "front.0", before=2) == [request(0), request(2, "other")]
    assert take_left(tmp_path, "front.0", before=2) == []


def test_living_fronts_and_other_names_are_left_alone(tmp_path: Path) -> None:
    """Only what is older than the first that may be alive is read, and only of that name."""
    for incarnation in (1, 2, 10):
        opened(tmp_path, incarnation).begin(request(incarnation))
    other = OpenRequests(open_requests_path(tmp_path, "front.01", 1))
    other.begin(request(99))
    assert take_left(tmp_path, "front.0", before=10) == [request(1), request(2)]
    assert take_left(tmp_path, "front.01", before=2) == [request(99)]


def test_more_requests_than_slots_all_fit(tmp_path: Path) -> None:
    """The file grows; slots are used again."""
    front = opened(tmp_path)
    slots = [front.begin(request(number)) for number in range(3000)]
    for slot in slots[:2990]:
        front.end(slot)
    front.begin(request(5000))
    left = take_left(tmp_path, "front.0", before=2)
    assert {one.request_id for one in left} == {f"r{n}" for n in (*range(2990, 3000), 5000)}


def test_entry_cut_off_in_the_middle_is_none_and_a_long_name_is_shortened(tmp_path: Path) -> None:
    """The others are read all the same."""
    front = opened(tmp_path)
    front.begin(request(0))
    front.begin(request(1, "x" * 2000))
    path = open_requests_path(tmp_path, "front.0", 1)
    with path.open("r+b") as file:
        file.seek(10)
        file.write(b"\xff" * 8)
    (left,) = take_left(tmp_path, "front.0", before=2)
    assert (left.request_id, left.model) == ("r1", "x" * 100)


def test_front_that_ends_in_order_leaves_no_file(tmp_path: Path) -> None:
    """There is nothing to record in its place."""
    opened(tmp_path).close()
    assert list(tmp_path.iterdir()) == []
