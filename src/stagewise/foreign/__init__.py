"""Attribution scores that other tools have written, read as influence with this library's sign."""
