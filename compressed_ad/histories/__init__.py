"""Learning histories: collected, stored in checksummed HDF5 files, described, exchanged."""
