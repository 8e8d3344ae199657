"""What crosses a process boundary: events, commands, messages, subjects. pydantic only."""
