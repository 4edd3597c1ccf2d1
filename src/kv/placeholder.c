/* placeholder */ typedef int qtr_placeholder;
