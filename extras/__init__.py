"""What is beyond the paper. This file makes `import extras` find this folder, and no other."""
