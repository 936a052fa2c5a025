"""How fast ``fit`` is, side by side: ``__main__.py`` says how it is measured, docs/performance.md what came of it."""
