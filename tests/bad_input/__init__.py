"""The table of bad input: entrances × faults, each really executed by test_bad_input.py."""
