"""Whether a run fits on devices that are not there: its programs are compiled for them, and the bytes added up."""
