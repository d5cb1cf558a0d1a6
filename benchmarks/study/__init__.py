"""Does a cut encoder score as well after fine-tuning, and do the rules pick good depths? ``make study`` runs it."""
