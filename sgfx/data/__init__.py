"""Images with classes: from folders, from torchvision's data sets, or made; read, augmented and put into batches."""
