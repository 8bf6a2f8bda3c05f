"""`python -m cortexd` is the same as the `cortexd` command."""

_INTERRUPTED = 130  # of cli.exit_code, which is not there yet


def main() -> int:
    """Run the command line; return its exit code, also when Ctrl-C comes while it is imported."""
    try:
        from cli.main import main as run
    except KeyboardInterrupt:
        return _INTERRUPTED
    return run()


if __name__ == "__main__":
    raise SystemExit(main())
