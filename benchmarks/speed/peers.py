ARMS: dict = {}
