"""The paper: which layers, which groups, what goes (eq. 5 to 14), masked or lowered."""
