"""Pure tensor functions shared by papers. They know no modules and no hosts."""
