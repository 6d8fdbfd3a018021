"""A server of completions: what OpenAI's protocol says (protocol), the thread that an engine runs in (worker), who is
answered over HTTP (app), and the process (server)."""
