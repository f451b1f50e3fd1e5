"""`mixerzoo profile`: what is known of every site, before a search and after one."""
