"""What a model's text means: reasoning, content and tool calls, found by the same incremental machine for streams and whole answers."""
