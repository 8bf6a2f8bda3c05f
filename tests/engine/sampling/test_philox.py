"""The counter-based random numbers."""

from engine.sampling.philox import philox4x32, uniform


def test_philox_known_answers_match_the_papers_reference() -> None:
    """The three vectors of the authors' known-answer file."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones,) * 4, (ones, ones)) == (
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    )
    assert philox4x32(pi, (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def test_uniform_differs_by_seed_and_position_and_is_evenly_spread() -> None:
    """Ten thousand draws fill ten bins evenly and never repeat."""
    draws = [uniform(seed, position) for seed in range(100) for position in range(100)]
    assert len(set(draws)) == len(draws)
    bins = [sum(low <= 10 * draw < low + 1 for draw in draws) for low in range(10)]
    assert sum(bins) == len(draws)
    assert all(850 < count < 1150 for count in bins)
