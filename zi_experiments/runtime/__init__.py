"""Services that a run uses while it executes: progress, processes, folders, locks, memory."""
