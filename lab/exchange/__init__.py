"""What others read and write: programs that run on a checkpoint of the lab."""
