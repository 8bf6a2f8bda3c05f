"""The answers of nodes, read from their bytes: whole, in pieces, and such as are none."""

from __future__ import annotations

import pytest

from actors.front.answer_parser import AnswerParser, BadAnswer, chunk_line

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = {
    "length": (HEAD + b"Content-Length: 5\r\n\r\nhello", b"hello", True),
    "empty": (HEAD + b"Content-Length: 0\r\n\r\n", b"", True),
    "no-content": (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", b"", True),
    "chunked": (CHUNKED + b"3\r\nhel\r\n02 ; x=y\r\nlo\r\n0\r\n\r\n", b"hello", True),
    "trailer": (CHUNKED + b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-B: 2\r\n\r\n", b"hello", True),
    "informed": (b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"1\r\n\n\r\n0\r\n\r\n", b"\n", True),
    "closes": (HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    "old": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
}


@pytest.mark.parametrize("name", WHOLE)
def test_answer_is_read_in_pieces_of_any_size(name: str) -> None:
    """Where the network cuts it changes nothing."""
    data, body, keeps_alive = WHOLE[name]
    for size in (1, 2, 3, 7, len(data)):
        parser = AnswerParser()
        pieces = [parser.push(data[at : at + size]) for at in range(0, len(data), size)]
        assert b"".join(pieces) == body
        assert parser.is_complete
        assert parser.keeps_alive is keeps_alive
        assert parser.status in {200, 204}


def test_bytes_after_the_answer_end_the_connection() -> None:
    """A second answer that nobody asked for must not pass for the next one's."""
    for data in (WHOLE["length"][0], WHOLE["chunked"][0]):
        parser = AnswerParser()
        assert parser.push(data + b"HTTP/1.1 200 OK\r\n") == b"hello"
        assert parser.is_complete
        assert not parser.keeps_alive


def test_body_without_a_length_ends_with_the_connection() -> None:
    """And any other is cut off by it."""
    parser = AnswerParser()
    assert parser.push(HEAD + b"\r\nhel") + parser.push(b"lo") == b"hello"
    assert not parser.is_complete
    parser.end()
    assert parser.is_complete
    for name in ("length", "chunked"):
        parser = AnswerParser()
        parser.push(WHOLE[name][0][:-1])
        with pytest.raises(BadAnswer):
            parser.end()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        HEAD + b"X : 1\r\n\r\n",
        HEAD + b" folded\r\n\r\n",
        HEAD + b"X: a\nY: b\r\n\r\n",
        HEAD + b"no colon\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n",
        HEAD + b"Content-Length: +5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        CHUNKED + b"+5\r\nhello\r\n",
        CHUNKED + b"0x5\r\nhello\r\n",
        CHUNKED + b"5\nhello\r\n",
        CHUNKED + b"4\r\nhello\r\n",
        CHUNKED + b"5" * 5000,
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    ],
)
def test_what_is_no_answer_is_refused(data: bytes) -> None:
    """Above all what two readers could read in two ways."""
    parser = AnswerParser()
    with pytest.raises(BadAnswer):
        parser.push(data)


def test_chunk_line_is_what_servers_write_before_a_chunk() -> None:
    """For every size of a chunk; where none takes so many bytes it begins no chunk."""
    lines = {len(line) + size + 2: line for size in range(1, 70_000) if (line := b"%x\r\n" % size)}
    for num_bytes in range(70_000):
        line = chunk_line(num_bytes)
        assert line == lines.get(num_bytes, line)
        assert num_bytes in lines or not (b"1\r\n" + bytes(num_bytes)).startswith(line)
