"""How fast ``fit`` is, side by side: see ``__main__.py`` for how it is measured, and docs/performance.md for what came of it."""
