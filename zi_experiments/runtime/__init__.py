"""Services that a run uses while it lives: progress, processes, folders, locks, memory."""
