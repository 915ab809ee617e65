"""Programs of plain operations, in the formats that others run."""
