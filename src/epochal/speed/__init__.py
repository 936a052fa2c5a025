"""How fast a plan trains here: what would make it faster, and where the time goes. The plan stays as it is."""
