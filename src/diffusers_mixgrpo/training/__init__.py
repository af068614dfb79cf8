"""One training iteration: its plan, the engine that carries it out, its memory, and a preflight check."""
