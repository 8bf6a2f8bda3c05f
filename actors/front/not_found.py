"""What a path that does not exist is answered with: the one that was meant, or all there are.

Most clients that come here have a base URL with a part too many or too few, or speak an API that
this server does not have; both are for their user to mend, who sees nothing but this text.
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web

from cortexd.errors import NotFound


def no_route(request: web.Request) -> NotFound:
    """Return the error for a request whose path this listener does not have."""
    paths = sorted({resource.canonical for resource in request.app.router.resources()} - {"/"})
    meant = _meant(request.path, paths)
    hint = f"did you mean {meant}?" if meant else f"served here: {', '.join(paths)}"
    return NotFound(f"no route {request.method} {request.path}; {hint}")


def _meant(path: str, paths: Collection[str]) -> str | None:
    """Return the path that differs in slashes or by what stands before it, None if there is none.

    A base URL that lacks "/v1", has it twice, or ends with a slash.
    """
    tidy = "/" + "/".join(filter(None, path.split("/")))
    if tidy == "/":
        return None
    longer = [known for known in paths if known.endswith(tidy)]
    shorter = [known for known in paths if tidy.endswith(known)]
    return min(longer, key=len, default=None) or max(shorter, key=len, default=None)
