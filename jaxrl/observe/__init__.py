"""What a run shows and writes: metrics, the terminal view, episode files, the final report, alarms."""
