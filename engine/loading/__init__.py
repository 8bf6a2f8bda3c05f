"""From a checkpoint's mapped files to the layers of one rank."""
