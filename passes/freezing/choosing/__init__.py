"""How each layer and the whole are run: the candidates, the stopwatch that decides, and the record of what it said."""
