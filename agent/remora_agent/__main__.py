"""`python -m remora_agent` is the command `remora-agent`."""

from remora_agent.cli import main

if __name__ == "__main__":
    main()
