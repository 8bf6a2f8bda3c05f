"""The 56 ways in which a request goes wrong, or a fleet does, and what a client must see of it.

`test_table.py` holds that each row is proven: by tests of this folder, which bear the row's number
in their names and run both dialects, or by the named tests elsewhere.
"""

from __future__ import annotations

from typing import Final

from tests.cases.case import Case, Refusal

_INVALID: Final = "invalid_request_error"
_A400: Final = Refusal(400, _INVALID)
_A404: Final = Refusal(404, "not_found_error")
_A413: Final = Refusal(413, "request_too_large")
_A502: Final = Refusal(502, "api_error", retry=True)
_A529: Final = Refusal(529, "overloaded_error", retry=True)

_FRONT: Final = "tests/actors/front"
_ROUTER: Final = "tests/actors/router/test_router.py"
_FLEET: Final = "tests/actors/router/test_fleet.py"
_SCENARIOS: Final = "tests/tree/test_scenarios.py"

_ROWS: Final = (
    Case(
        1,
        "body is not JSON",
        "refused before routing; no node is called",
        Refusal(400, _INVALID, "invalid_json"),
        _A400,
        (f"{_FRONT}/test_fuzz.py::test_fuzz_any_bytes_never_500",),
    ),
    Case(
        2,
        "no object, wrong types, NaN, nested 10,000 deep",
        "the same, with the field in `param` where there is one; no recursion kills the parser",
        Refusal(400, _INVALID, "invalid_type"),
        _A400,
        (f"{_FRONT}/test_bad_input.py::test_chat_each_bad_field_is_refused_by_name",),
        "NaN and deep nesting are invalid_json: neither is JSON that this server reads",
    ),
    Case(
        3,
        "duplicate keys, huge integers, lone surrogates, NUL",
        "accepted or 400, always the same; the log stays whole",
        Refusal(400, _INVALID, "invalid_json"),
        _A400,
        deviation="the last of two keys counts, NUL in a text is a character; both are accepted",
    ),
    Case(
        4,
        "no `model`",
        "the field is named",
        Refusal(400, _INVALID, "missing_required_parameter"),
        _A400,
    ),
    Case(5, "messages without `max_tokens`", "that dialect's rule", None, _A400),
    Case(
        6,
        "unknown model",
        "close names, no attempt to load",
        Refusal(404, _INVALID, "model_not_found"),
        _A404,
        ("tests/tree/test_fleet.py::test_models_that_no_node_serves",),
    ),
    Case(
        7,
        "known model that no node can ever hold",
        "permanent",
        Refusal(404, _INVALID, "model_not_feasible"),
        _A404,
        ("tests/tree/test_fleet.py::test_models_that_no_node_serves",),
    ),
    Case(
        8,
        "known model whose only node is down",
        "worth a retry",
        Refusal(503, "api_error", "no_healthy_node", retry=True),
        _A529,
        (f"{_FLEET}::test_node_that_refuses_is_left_alone_until_it_answers",),
    ),
    Case(
        9,
        "chat to an embedding model",
        "refused before a load",
        Refusal(422, _INVALID, "wrong_modality"),
        _A400,
        deviation="goes by the catalogue's `capabilities`; a model without any is taken to answer",
    ),
    Case(
        10,
        "declared length over the limit",
        "refused unread",
        Refusal(413, _INVALID, "request_too_large"),
        _A413,
    ),
    Case(
        11,
        "chunked body over the limit",
        "cut at the limit",
        Refusal(413, _INVALID, "request_too_large"),
        _A413,
    ),
    Case(
        12,
        "slow loris in head or body",
        "a head within 10 s, a body at a least rate; no seat is ever taken",
        Refusal(408, _INVALID, "request_timeout"),
        Refusal(408, _INVALID),
        deviation="a head that ends before its path is answered in OpenAI's envelope",
    ),
    Case(
        13,
        "oversize header, bad chunks, two lengths (smuggling)",
        "400, and the connection ends",
        Refusal(400, _INVALID, "invalid_request"),
        _A400,
    ),
    Case(
        14,
        "gzip bomb",
        "the limit counts unpacked bytes",
        Refusal(413, _INVALID, "request_too_large"),
        _A413,
    ),
    Case(
        15,
        "no key, bad key",
        "constant-time comparison; nothing is told of models",
        Refusal(401, _INVALID, "invalid_api_key"),
        Refusal(401, "authentication_error"),
        (f"{_FRONT}/test_keys.py::test_every_route_but_the_probes_asks_for_a_key",),
    ),
    Case(
        16,
        "key does not open the model",
        "refused by name",
        Refusal(403, _INVALID, "model_not_allowed"),
        Refusal(403, "permission_error"),
    ),
    Case(
        17,
        "budget used up for good",
        "no Retry-After, never 402",
        Refusal(429, "insufficient_quota", "insufficient_quota"),
        Refusal(429, "rate_limit_error"),
    ),
    Case(
        18,
        "budget of the window used up",
        "Retry-After is the window's end",
        Refusal(429, "rate_limit_error", "rate_limit_exceeded", retry=True),
        Refusal(429, "rate_limit_error", retry=True),
        (f"{_FRONT}/test_keys.py::test_window_says_when_it_is_over",),
        "Retry-After may be above 60 s: an earlier retry is sure to be refused again",
    ),
    Case(
        19,
        "queue is full",
        "at once, before a stream begins",
        Refusal(429, "rate_limit_error", "queue_full", retry=True),
        _A529,
        (f"{_SCENARIOS}::test_requests_beyond_the_seats_wait_in_a_bounded_queue",),
    ),
    Case(
        20,
        "queued past its deadline",
        "removed from the queue, counted",
        Refusal(503, "api_error", "queue_timeout", retry=True),
        _A529,
        (
            f"{_FLEET}::test_wait_for_a_seat_has_an_end",
            "tests/engine/scheduling/test_admission.py::"
            "test_who_waits_for_memory_too_long_is_told_what_it_lacks",
        ),
    ),
    Case(
        21,
        "prompt longer than the window",
        "before any work of the engine; both numbers are told",
        Refusal(400, _INVALID, "context_length_exceeded"),
        _A400,
        (f"{_FRONT}/test_messages.py::test_overlong_prompt_says_so_in_the_words_agents_know",),
    ),
    Case(
        22,
        "cold load, streaming",
        "200 after the hold, keep-alives, then tokens; recorded as cold",
        proofs=(f"{_SCENARIOS}::test_long_cold_load_is_one_load_with_progress_for_fifty",),
    ),
    Case(
        23,
        "cold load longer than a unary request may wait",
        "says how far it is; the load goes on",
        Refusal(503, "api_error", "model_loading", retry=True),
        _A529,
        (f"{_FLEET}::test_refusal_of_a_loading_model_says_how_far_it_is",),
    ),
    Case(
        24,
        "client leaves during a cold load",
        "its wait ends, 499 in the log; the load goes on",
        proofs=(
            f"{_FLEET}::test_request_that_ends_while_it_waits_holds_nothing",
            f"{_ROUTER}::test_request_that_ends_while_it_waits_opens_no_lease",
        ),
        deviation="the load is never broken off: the client that comes back finds the model",
    ),
    Case(
        25,
        "fifty requests for one cold model",
        "one load, all served",
        proofs=(
            f"{_ROUTER}::test_fifty_requests_for_a_cold_model_make_one_load",
            f"{_FLEET}::test_cold_model_is_loaded_once_for_fifty_requests",
            f"{_SCENARIOS}::test_long_cold_load_is_one_load_with_progress_for_fifty",
        ),
    ),
    Case(
        26,
        "load fails",
        "all that wait get the cause; it cools down; other models are untouched",
        Refusal(503, "api_error", "model_load_failed", retry=True),
        _A529,
        (
            f"{_FLEET}::test_failed_load_is_tried_elsewhere_then_tells_its_cause",
            f"{_FLEET}::test_load_with_a_structural_fault_is_tried_nowhere_else",
            f"{_ROUTER}::test_transient_failure_cools_down_then_is_retried",
            "tests/tree/test_hostile_models.py::"
            "test_each_broken_model_is_told_and_the_good_one_serves_on",
        ),
        "a fault of the model's files is 422 (400), not 500, which the clients would retry in vain",
    ),
    Case(
        27,
        "load stalls",
        "ended after a time without progress; tried at another node",
        Refusal(503, "api_error", "model_load_failed", retry=True),
        _A529,
        (
            "tests/tree/test_supervision_groups.py::"
            "test_load_that_stalls_is_killed_and_progress_extends_it",
            f"{_FLEET}::test_failed_load_is_tried_elsewhere_then_tells_its_cause",
        ),
        "is told as a failed load with its cause, not as 504: a client does the same about both",
    ),
    Case(
        28,
        "eviction of a model in use",
        "the lease wins; the newcomer waits or takes another",
        proofs=(
            f"{_ROUTER}::test_load_waits_for_a_busy_model_to_make_room",
            f"{_ROUTER}::test_unload_waits_for_requests_and_refuses_when_they_do_not_end",
            "tests/cortexd/test_eviction.py::test_used_and_unready_models_stay",
            "tests/tree/test_swap.py::test_model_in_use_is_not_displaced_but_waited_for",
        ),
    ),
    Case(
        29,
        "eviction between ready and the first request",
        "impossible: the lease is taken in the same step as the model is ready",
        proofs=(
            f"{_ROUTER}::test_fifty_requests_for_a_cold_model_make_one_load",
            "tests/cortexd/test_eviction.py::test_choice_is_sound_sufficient_and_minimal",
        ),
    ),
    Case(
        30,
        "idle time ends as a request arrives",
        "the request wins, or the model is loaded anew",
        proofs=(
            f"{_ROUTER}::test_idle_proposal_is_ignored_while_in_use",
            "tests/tree/test_swap.py::test_time_to_live_of_the_catalogue_holds_at_the_neuron",
        ),
    ),
    Case(
        31,
        "two models want the same memory, both wanted",
        "no ping-pong: all that wait for a model are served before it makes room",
        proofs=(
            f"{_ROUTER}::test_load_waits_for_a_busy_model_to_make_room",
            f"{_ROUTER}::test_two_loads_at_once_do_not_count_on_the_same_memory",
            "tests/tree/test_swap.py::test_model_in_use_is_not_displaced_but_waited_for",
            "tests/tree/test_swap.py::test_equal_models_swap_both_ways",
        ),
        deviation="no least time of residence: each load serves all that waited for it, and who "
        "waits 120 s for room that does not come is refused",
    ),
    Case(
        32,
        "node dies before it answers",
        "tried once more, elsewhere if there is another",
        Refusal(502, "api_error", "upstream_unavailable", retry=True),
        _A502,
        (f"{_FRONT}/test_proxy.py::test_connection_closed_before_the_head_is_tried_once_more",),
    ),
    Case(
        33,
        "node dies in the middle of a stream",
        "an error event, no end mark; what was used is recorded",
        Refusal(None, "api_error", "upstream_interrupted"),
        Refusal(None, "api_error"),
        (
            "tests/tree/test_fleet.py::"
            "test_node_that_dies_in_the_middle_of_a_stream_ends_it_with_an_error",
        ),
    ),
    Case(
        34,
        "node stalls in the middle of a stream",
        "as 33, after 60 s without a sign of life (300 s of a server that gives none)",
        Refusal(None, "api_error", "upstream_stalled"),
        Refusal(None, "timeout_error"),
    ),
    Case(
        35,
        "node sends an event that is no JSON",
        "passed on as it is; where it is translated skipped, and ended at the third",
        None,
        Refusal(None, "api_error"),
        deviation="in the node's own dialect nothing is read, so nothing is refused; the code "
        "upstream_protocol shows in the log alone, since this dialect has no codes",
    ),
    Case(
        36,
        "end mark in a text, CRLF, comments, `data:` without space, data of many lines",
        "read by lines, as the specification of events has it",
        proofs=(f"{_FRONT}/test_foreign_messages.py::test_stream_is_the_same_wherever_it_is_cut",),
    ),
    Case(
        37,
        "UTF-8 split at any byte",
        "identical text",
        proofs=(
            f"{_FRONT}/test_foreign_messages.py::test_stream_is_the_same_wherever_it_is_cut",
            f"{_FRONT}/test_relayed.py::test_any_cut_gives_the_same_bytes_lines_and_counts",
        ),
    ),
    Case(38, "node tells no usage", "counted here, flagged `estimated` in the log"),
    Case(
        39,
        "node answers an error with HTML or nothing",
        "in the dialect's envelope, of the same class of status, with the node's Retry-After",
        Refusal(502, "api_error", "upstream_error"),
        Refusal(502, "api_error"),
        ("tests/tree/test_fleet.py::test_errors_of_a_server_keep_status_and_hint_in_our_envelope",),
        "a status that was received is kept; 502 stands for those that a translation leaves open",
    ),
    Case(
        40,
        "client does not read",
        "bounded buffers, back-pressure to the node, dropped after 120 s",
        proofs=(
            f"{_FRONT}/test_sequences.py::test_queue_overflow_fails_the_reader_and_calls_back_once",
        ),
    ),
    Case(41, "client closes its half of the connection", "as if it had gone; 499 in the log"),
    Case(
        42,
        "client leaves while queued, in prefill, in decode",
        "the engine's work is cancelled, seat and budget are settled; 499 in the log",
        proofs=(
            f"{_FRONT}/test_keys.py::test_client_that_leaves_pays_for_what_was_produced",
            f"{_FRONT}/test_proxy.py::test_client_that_leaves_closes_the_nodes_socket",
            "tests/tree/test_serving.py::test_client_that_vanishes_mid_stream_frees_its_sequence",
            "tests/tree/test_keys.py::test_client_that_leaves_a_stream_pays_for_what_it_got",
        ),
    ),
    Case(
        43,
        "node flaps",
        "held down, then tried by one request; no request fails where another node serves",
        Refusal(503, "api_error", "no_healthy_node", retry=True),
        _A529,
        (
            "tests/cortexd/test_breaker.py::test_flapping_node_is_held_down",
            "tests/cortexd/test_breaker.py::"
            "test_half_open_lets_one_through_and_doubles_at_its_failure",
            f"{_FLEET}::test_node_that_fails_requests_is_left_alone_then_tried_by_one",
            f"{_SCENARIOS}::test_node_that_flaps_is_held_down_and_no_request_fails",
        ),
    ),
    Case(
        44,
        "node misses its polls while its stream flows",
        "data is a sign of life: the stream goes on",
    ),
    Case(45, "clock jumps", "durations and deadlines are monotonic"),
    Case(
        46,
        "duplicate node name, second daemon",
        "refused with the cause",
        proofs=(
            "tests/tree/test_supervision.py::test_second_start_names_the_running_pid",
            "tests/cortexd/test_config.py::test_file_error_names_line_key_and_what_is_allowed",
        ),
        deviation="two daemons with folders of their own may share a device: each goes by the "
        "memory that is free",
    ),
    Case(
        47,
        "node or actor restarts at the same address",
        "every message names its incarnation; stale ones are dropped, state is rebuilt",
        proofs=(
            "tests/actors/test_mailbox.py::"
            "test_ask_table_answer_of_another_incarnation_is_not_taken",
            f"{_FRONT}/test_sequences.py::test_table_fails_only_the_dead_incarnation_and_epoch",
            "tests/tree/test_fleet.py::test_restarted_gateway_router_knows_the_fleet_again",
            "tests/tree/test_supervision_groups.py::"
            "test_router_that_restarts_finds_the_running_groups",
        ),
    ),
    Case(
        48,
        "another model at a port that was used before",
        "the node checks; it is tried once elsewhere, then told as what it is",
        Refusal(502, "api_error", "model_mismatch", retry=True),
        _A502,
        ("tests/actors/test_worker.py::test_request_of_another_epoch_or_model_is_refused",),
        "external servers call one model by many names, so theirs are not compared",
    ),
    Case(
        49,
        "slow joiner, full queue, garbage or oversize frame",
        "snapshot and sequence; the message is dropped, not the process",
        proofs=(
            "tests/actors/test_registry.py::test_registry_gap_or_repetition_is_an_error",
            "tests/actors/test_actor_loop.py::"
            "test_ask_to_a_peer_that_does_not_read_is_mailbox_full",
            "tests/actors/test_mailbox.py::test_intake_survives_any_frames",
            "tests/tree/test_supervision_admin.py::"
            "test_bad_frame_gets_an_error_and_the_daemon_lives",
            "tests/tree/test_supervision_admin.py::test_oversize_request_gets_an_error",
        ),
    ),
    Case(
        50,
        "reload of a configuration with an error",
        "the old one stays; the error names the line",
        proofs=(
            "tests/actors/test_reloader.py::test_change_is_told_and_a_bad_version_changes_nothing",
            f"{_SCENARIOS}::test_catalogue_is_reloaded_under_traffic",
        ),
    ),
    Case(
        51,
        "disk full, cache unreadable",
        "checked before the load; the path and both sizes are told",
        Refusal(507, "api_error", "insufficient_disk"),
        Refusal(529, "overloaded_error"),
        (
            "tests/engine/sources/test_hub.py::test_resolve_too_little_disk_is_refused_first",
            "tests/engine/sources/test_hub.py::test_resolve_disk_full_while_downloading",
        ),
        "507 says what it is; no Retry-After: no wait frees a disk",
    ),
    Case(
        52,
        "fault that poisons the device",
        "the process ends with a code of its own and starts anew; no request hangs",
        Refusal(503, "api_error", "engine_restarting", retry=True),
        _A529,
        (
            "tests/tree/test_supervision_groups.py::test_poisoned_rank_says_why_and_exits_70",
            "tests/tree/test_step_faults.py::test_lost_device_ends_the_process_with_its_own_code",
        ),
    ),
    Case(
        53,
        "shutdown with open streams",
        "nothing new; what runs may end, then an error event; exit code 0",
        Refusal(None, "api_error", "server_shutting_down"),
        Refusal(None, "overloaded_error"),
        (
            f"{_FRONT}/test_front.py::test_front_drain_lets_streams_finish",
            f"{_FRONT}/test_failures.py::test_draining_refuses_new_requests_and_closes",
        ),
    ),
    Case(
        54,
        "no file descriptor is left",
        "connections beyond are shed, those that exist go on; it recovers",
        deviation="shed without an answer or a count: there is no descriptor to send one "
        "through, and it is the event loop that sheds",
    ),
    Case(
        55,
        "random model names as label values",
        "all unknown models share one label",
        Refusal(404, _INVALID, "model_not_found"),
        _A404,
    ),
    Case(
        56,
        "line feeds and escapes in the model's name",
        "escaped in the log",
        Refusal(404, _INVALID, "model_not_found"),
        _A404,
    ),
)

CASES: Final[dict[int, Case]] = {case.number: case for case in _ROWS}
