"""What a user's loss imports."""

table = {"temperature": 1.0}


def temperature():
    return table["temperature"]
