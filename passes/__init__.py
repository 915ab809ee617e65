"""The compiler: passes over torch.fx graphs, and the layers they emit."""
