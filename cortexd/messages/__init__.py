"""All messages between actors: one tagged msgspec struct each, grouped by what they are about.

`Body` is the closed union that the transport decodes; a frame that is none of these is refused and
counted. Keep fields append-only within a release.
"""

from __future__ import annotations

from cortexd.errors import ErrorInfo
from cortexd.messages.admin import AdminCommand, AdminProgress, AdminReply
from cortexd.messages.budgets import KeysChanged, ReportUsage, Reserve, UsageEntry
from cortexd.messages.control import (
    ActorDown,
    ActorInfo,
    ActorUp,
    Beat,
    Bye,
    Drain,
    GroupDown,
    GroupStarting,
    GroupUp,
    Hello,
    Ok,
    Ping,
    Pong,
    Progress,
    Ready,
    SetLogLevel,
    StartGroup,
    Stop,
    StopGroup,
    Welcome,
)
from cortexd.messages.fleet import (
    DescribeModel,
    EndRequest,
    EvictionProposal,
    HeldLease,
    HeldLeases,
    HostReport,
    LeaseReport,
    ListModels,
    LoadModel,
    LoadProgress,
    LoadReport,
    ModelList,
    ModelLoaded,
    ProposeEviction,
    QueryHost,
    QueryLoad,
    ReadText,
    RecycleModel,
    RequestFinished,
    RequestsFinished,
    ResolvedFiles,
    ResolveFiles,
    ResolveProgress,
    Route,
    Routed,
    SleepModel,
    UnloadIdle,
    UnloadModelNow,
    WakeModel,
)
from cortexd.messages.inference import Cancel, Submit, TokenBatch
from cortexd.messages.metrics import Gauges, Measured, Sample
from cortexd.messages.neurons import (
    Loading,
    LoadOnNode,
    NeuronReport,
    NodeFailed,
    NodeView,
    Place,
    QueryLoading,
    QueryNode,
    RoutedHere,
    RoutedRemote,
    UnloadOnNode,
)
from cortexd.messages.reload import CatalogueChanged, ReloadFiles
from cortexd.messages.rpc import Reply, Request

Body = (
    ErrorInfo
    | AdminCommand
    | AdminProgress
    | AdminReply
    | ActorDown
    | ActorInfo
    | ActorUp
    | Beat
    | Bye
    | Drain
    | GroupDown
    | GroupStarting
    | GroupUp
    | Hello
    | Ok
    | Ping
    | Pong
    | Progress
    | Ready
    | SetLogLevel
    | StartGroup
    | Stop
    | StopGroup
    | Welcome
    | Gauges
    | KeysChanged
    | Measured
    | Loading
    | ReportUsage
    | Reserve
    | LoadOnNode
    | NeuronReport
    | NodeFailed
    | NodeView
    | Place
    | QueryLoading
    | QueryNode
    | RoutedHere
    | RoutedRemote
    | UnloadOnNode
    | DescribeModel
    | EndRequest
    | HeldLeases
    | EvictionProposal
    | HostReport
    | LeaseReport
    | ListModels
    | LoadModel
    | LoadProgress
    | LoadReport
    | ModelList
    | ModelLoaded
    | ProposeEviction
    | QueryHost
    | QueryLoad
    | ResolveFiles
    | ResolvedFiles
    | ResolveProgress
    | ReadText
    | RecycleModel
    | RequestsFinished
    | Route
    | Routed
    | SleepModel
    | UnloadIdle
    | UnloadModelNow
    | WakeModel
    | CatalogueChanged
    | ReloadFiles
    | Cancel
    | Submit
    | TokenBatch
    | Request
    | Reply
)

__all__ = [
    "ActorDown",
    "ActorInfo",
    "ActorUp",
    "AdminCommand",
    "AdminProgress",
    "AdminReply",
    "Beat",
    "Body",
    "Bye",
    "Cancel",
    "CatalogueChanged",
    "DescribeModel",
    "Drain",
    "EndRequest",
    "ErrorInfo",
    "EvictionProposal",
    "Gauges",
    "GroupDown",
    "GroupStarting",
    "GroupUp",
    "HeldLease",
    "HeldLeases",
    "Hello",
    "HostReport",
    "KeysChanged",
    "LeaseReport",
    "ListModels",
    "LoadModel",
    "LoadOnNode",
    "LoadProgress",
    "LoadReport",
    "Loading",
    "Measured",
    "ModelList",
    "ModelLoaded",
    "NeuronReport",
    "NodeFailed",
    "NodeView",
    "Ok",
    "Ping",
    "Place",
    "Pong",
    "Progress",
    "ProposeEviction",
    "QueryHost",
    "QueryLoad",
    "QueryLoading",
    "QueryNode",
    "ReadText",
    "Ready",
    "RecycleModel",
    "ReloadFiles",
    "ReportUsage",
    "RequestFinished",
    "RequestsFinished",
    "Reserve",
    "ResolveFiles",
    "ResolveProgress",
    "ResolvedFiles",
    "Route",
    "Routed",
    "RoutedHere",
    "RoutedRemote",
    "Sample",
    "SetLogLevel",
    "SleepModel",
    "StartGroup",
    "Stop",
    "StopGroup",
    "Submit",
    "TokenBatch",
    "UnloadIdle",
    "UnloadModelNow",
    "UnloadOnNode",
    "UsageEntry",
    "WakeModel",
    "Welcome",
]
