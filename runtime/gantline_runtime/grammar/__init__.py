"""Output that a grammar constrains: compiled beside the engine, matched and turned into masks while the forward pass runs.

Grammars are xgrammar's structural tags, as JSON: one notation for JSON schemas, regular expressions, EBNF, choices and tool calls, and for
free text around them (https://xgrammar.mlc.ai/docs, "Structural Tag"). The server writes them; the engine only compiles and follows them.
"""
