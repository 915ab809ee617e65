"""How far a regrouped model is from the masked one it stands for."""
