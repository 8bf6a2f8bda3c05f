"""The router's part of the admin protocol: models, load, unload, retry, requests."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from msgspec import Meta

from actors.operation_report import report_operation
from cortexd.errors import CortexError, InvalidRequest, NotFound
from cortexd.messages import AdminCommand, AdminReply
from cortexd.models import LoadOptions

if TYPE_CHECKING:
    from actors.router.router import Router

T = TypeVar("T")


class NoArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operation without arguments."""


class LoadArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`model.load`."""

    model_id: str
    harness: str = "torch"
    quant: str | None = None
    tensor_parallel: Annotated[int, Meta(ge=1, le=64)] = 1
    devices: tuple[Annotated[int, Meta(ge=0)], ...] | None = None


class ModelArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`model.unload` and `model.retry`."""

    model_id: str
    force: bool = False


class DrainArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`drain`."""

    on: bool


class RouterAdmin:
    """Decode, run, report."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._commands: dict[str, Callable[[AdminCommand], Awaitable[object]]] = {
            "models": self._models,
            "model.load": self._load,
            "model.unload": self._unload,
            "model.retry": self._retry,
            "requests": self._requests,
            "drain": self._drain,
        }

    async def run(self, command: AdminCommand) -> AdminReply:
        """Run one command. Raises: NotFound, InvalidRequest, or what the command raises."""
        handler = self._commands.get(command.op)
        if handler is None:
            raise NotFound(
                f'unknown operation "{command.op}"; the router knows {", ".join(self._commands)}'
            )
        return AdminReply(msgspec.json.encode(await handler(command)))

    async def _models(self, command: AdminCommand) -> object:
        _decode(command, NoArgs)
        here = [msgspec.to_builtins(model.status()) for model in self._router.models.values()]
        nodes = self._router.fleet.statuses()
        remote = [
            {
                "model_id": model.model_id,
                "state": model.state,
                "node": node.name,
                "in_flight": model.in_flight + model.queue_depth,
                "memory_bytes": (model.memory_mib or 0) << 20,
                "limits": msgspec.to_builtins(model.limits),
                "error" if model.state == "failed" else "stage": model.detail,
            }
            for node in nodes
            if node.is_healthy
            for model in node.models
        ]
        return {
            "models": here + remote,
            "aliases": self._router.aliases,
            "nodes_down": [node.name for node in nodes if not node.is_healthy],
        }

    async def _requests(self, command: AdminCommand) -> object:
        _decode(command, NoArgs)
        router = self._router
        here = [
            (router.node_name, request, lease)
            for model in router.models.values()
            for request, lease in model.leases.items()
        ]
        return {
            "requests": [
                {
                    "request_id": request,
                    "model": lease.model_id,
                    "node": node,
                    "front": lease.front,
                }
                for node, request, lease in [*here, *router.fleet.nodes.leases()]
            ]
        }

    async def _drain(self, command: AdminCommand) -> object:
        args = _decode(command, DrainArgs)
        self._router.drain(is_on=args.on)
        in_flight = sum(len(model.leases) for model in self._router.models.values())
        return {"draining": args.on, "in_flight": in_flight}

    async def _load(self, command: AdminCommand) -> object:
        args = _decode(command, LoadArgs)
        options = LoadOptions(
            model_id=args.model_id,
            harness=args.harness,
            quant=args.quant,
            tensor_parallel=args.tensor_parallel,
            devices=args.devices,
        )
        return self._accept(command, args.model_id, self._router.load(options))

    async def _unload(self, command: AdminCommand) -> object:
        args = _decode(command, ModelArgs)
        return self._accept(
            command, args.model_id, self._router.unload(args.model_id, force=args.force)
        )

    async def _retry(self, command: AdminCommand) -> object:
        args = _decode(command, ModelArgs)
        model = self._router.local.find(args.model_id)
        return self._accept(command, args.model_id, self._router.load(model.options))

    def _accept(self, command: AdminCommand, model_id: str, work: Awaitable[None]) -> object:
        self._router.spawn(self._finish(command.operation_id, model_id, work))
        return {"accepted": True, "model_id": model_id}

    async def _finish(self, operation_id: str, model_id: str, work: Awaitable[None]) -> None:
        try:
            await work
        except CortexError as error:
            report_operation(self._router, operation_id, "failed", error.to_info())
            return
        model = self._router.models.get(self._router.local.resolve(model_id))
        report_operation(
            self._router, operation_id, "done", model.status() if model else {"model_id": model_id}
        )


def _decode(command: AdminCommand, args_type: type[T]) -> T:
    """Return the typed arguments. Raises: InvalidRequest naming the field."""
    try:
        return msgspec.convert(
            {name: msgspec.json.decode(raw) for name, raw in command.args.items()}, type=args_type
        )
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"{command.op}: {error}") from error
