"""The commands of ``python -m data_prep``: arguments in, one function called, a summary printed."""
