"""How weights move: optimizers and learning rate schedules, by name or as torch objects."""
