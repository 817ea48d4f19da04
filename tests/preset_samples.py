"""Small files in the form that banks and apps export, one for each preset, and what stands in them."""

from datetime import date

ING_DE = """Umsatzanzeige;Datei erstellt am: 01.02.2026 15:45

IBAN;DE77 5001 0517 5405 3248 61
Kontoname;Girokonto
Bank;ING
Kunde;Erika Mustermann
Zeitraum;01.01.2026 - 01.02.2026
Saldo;1.446,10;EUR

Sortierung;Datum absteigend

In der CSV-Datei finden Sie alle bereits gebuchten Umsätze. Die vorgemerkten Umsätze werden nicht aufgenommen, auch wenn sie in Ihrem Internetbanking angezeigt werden.

Buchung;Wertstellungsdatum;Auftraggeber/Empfänger;Buchungstext;Verwendungszweck;Saldo;Währung;Betrag;Währung
30.01.2026;30.01.2026;VISA REWE;Lastschrift;NR XXXX 4711 KÖLN;1.446,10;EUR;-8,79;EUR
28.01.2026;28.01.2026;Beispiel AG;Gehalt/Rente;Gehalt Januar;1.454,89;EUR;1.250,00;EUR
"""
DKB = """"Girokonto";"DE02120300000000202051"
"Zeitraum:";"01.03.2025 - 31.03.2025"
"Kontostand vom 31.03.2025:";"1.361,16 €"
""
"Buchungsdatum";"Wertstellung";"Status";"Zahlungspflichtige*r";"Zahlungsempfänger*in";"Verwendungszweck";"Umsatztyp";"IBAN";"Betrag (€)";"Gläubiger-ID";"Mandatsreferenz";"Kundenreferenz"
"31.03.25";"";"Vorgemerkt";"ISSUER";"Telefon AG";"Kundennr 555";"Ausgang";"DE98700202700000012345";"-39,99";"";"";""
"28.03.25";"28.03.25";"Gebucht";"Beispiel GmbH";"Erika Muster";"Lohn 03/25";"Eingang";"DE17100500000123456789";"1.000";"";"";""
"27.03.25";"28.03.25";"Gebucht";"ISSUER";"Bäckerei Süß";"VISA Debitkartenumsatz";"Ausgang";"DE96120300009005290904";"-15,18";"";"";"4850"
"""
DKB_OLD = """"Kontonummer:";"DE02120300000000202051 / Girokonto";

"Von:";"01.03.2019";
"Bis:";"31.03.2019";
"Kontostand vom 31.03.2019:";"5.000,01 EUR";

"Buchungstag";"Wertstellung";"Buchungstext";"Auftraggeber / Begünstigter";"Verwendungszweck";"Kontonummer";"BLZ";"Betrag (EUR)";"Gläubiger-ID";"Mandatsreferenz";"Kundenreferenz";
"29.03.2019";"29.03.2019";"Lastschrift";"Stadtwerke Düren";"Abschlag März";"DE17100500000123456789";"BELADEBEXXX";"-1.049,99";"DE98ZZZ09999999999";"M-1";"";
"""
SPARKASSE = """"Auftragskonto";"Buchungstag";"Valutadatum";"Buchungstext";"Verwendungszweck";"Glaeubiger ID";"Mandatsreferenz";"Kundenreferenz (End-to-End)";"Sammlerreferenz";"Lastschrift Ursprungsbetrag";"Auslagenersatz Ruecklastschrift";"Beguenstigter/Zahlungspflichtiger";"Kontonummer/IBAN";"BIC (SWIFT-Code)";"Betrag";"Waehrung";"Info"
"DE02120300000000202051";"27.04.26";"27.04.26";"KARTENZAHLUNG";"2026-04-26 Debitk.1";"";"";"";"";"";"";"TANKSTELLE";"DE45120300001234567890";"BYLADEM1001";"-50,00";"EUR";"Umsatz vorgemerkt"
"DE02120300000000202051";"24.04.26";"24.04.26";"FOLGELASTSCHRIFT";"Abschlag 04/2026";"DE98ZZZ09999999999";"M-4711";"E2E-0924-1";"";"";"";"Stadtwerke Müllheim";"DE45120300001234567890";"BYLADEM1001";"-89,90";"EUR";"Umsatz gebucht"
"DE02120300000000202051";"23.04.26";"23.04.26";"GUTSCHR. UEBERWEISUNG";"Rechnung RE-2026; Danke";"";"";"NOTPROVIDED";"";"";"";"Beispiel Handel GmbH";"DE17100500000123456789";"BELADEBEXXX";"1143,41";"EUR";"Umsatz gebucht"
"""
COMDIRECT = """;
"Umsätze Girokonto";"Zeitraum: 30 Tage";
"Neuer Kontostand";"1.165,44 EUR";

"Buchungstag";"Wertstellung (Valuta)";"Vorgang";"Buchungstext";"Umsatz in EUR";
"offen";"offen";"Lastschrift / Belastung";"Auftraggeber: Kiosk Buchungstext: Zeitung";"-3,20";
"27.10.2025";"27.10.2025";"Lastschrift / Belastung";"Auftraggeber: Netflix International B.V. Buchungstext: Netflix Monatsabo Ref. 0A0B0C/12";"-34,56";
"24.10.2025";"24.10.2025";"Übertrag / Überweisung";"Empfänger: Thomas MüllerKto/IBAN: DE68200411110716629100 BLZ/BIC: COBADEHDXXX  Buchungstext: Uebertrag auf Girokonto Ref. 2W2C29/2481";"-5.000,00";

"Alter Kontostand";"6.200,00 EUR";
"""
VOLKSBANK = """Bezeichnung Auftragskonto;IBAN Auftragskonto;BIC Auftragskonto;Bankname Auftragskonto;Buchungstag;Valutadatum;Name Zahlungsbeteiligter;IBAN Zahlungsbeteiligter;BIC (SWIFT-Code) Zahlungsbeteiligter;Buchungstext;Verwendungszweck;Betrag;Waehrung;Saldo nach Buchung;Bemerkung;Gekennzeichneter Umsatz;Glaeubiger ID;Mandatsreferenz
Girokonto;DE02120300000000202051;GENODEF1XXX;Volksbank;04.03.2025;04.03.2025;Hofladen Öhler;DE17100500000123456789;BELADEBEXXX;Basislastschrift;Kartoffeln EREF: 12;-12,40;EUR;2938,28;;;DE98ZZZ09999999999;M-1
Girokonto;DE02120300000000202051;GENODEF1XXX;Volksbank;03.03.2025;03.03.2025;Beispiel AG;DE17100500000123456789;BELADEBEXXX;Gehalt;Lohn Februar;2950,68;EUR;2950,68;;;;
"""
PAYPAL = """"Date","Time","TimeZone","Name","Type","Status","Currency","Gross","Fee","Net","From Email Address","To Email Address","Transaction ID","Item Title","Reference Txn ID","Balance","Subject","Note","Balance Impact"
"01/03/2023","13:57:10","PST","Uber Technologies, Inc","General Authorization","Pending","USD","-42.92","0.00","-42.92","me@example.com","uber@example.com","91C639911G078571","","","0.00","","","Memo"
"01/13/2023","09:12:00","PST","Jana Small","General Payment","Completed","USD","1,250.00","-43.40","1,206.60","jana@example.com","me@example.com","1AB23456CD789012E","Old bike","","1,206.60","","","Credit"
"01/14/2023","10:00:00","PST","Book Shop","Express Checkout Payment","Completed","USD","-19.99","0.00","-19.99","me@example.com","shop@example.com","2BC34567DE890123F","A book","","1,186.61","","","Debit"
"""
BOFA = """Description,,Summary Amt.
Beginning balance as of 04/01/2026,,"1,000.00"
Total credits,,"2,500.00"
Total debits,,"-45.00"
Ending balance as of 04/30/2026,,"3,455.00"

Date,Description,Amount,Running Bal.
04/01/2026,Beginning balance as of 04/01/2026,,"1,000.00"
04/02/2026,"WHOLE FOODS #123 AUSTIN TX","-45.00","955.00"
04/13/2026,"ACME INC DES:PAYROLL","2,500.00","3,455.00"
"""
D = date
# preset -> (file, rows (day, amount_minor, currency, payee), {account, opening, closing, set aside})
SAMPLES = {
    "n26": ('''"Booking Date","Value Date","Partner Name","Partner Iban",Type,"Payment Reference","Account Name","Amount (EUR)","Original Amount","Original Currency","Exchange Rate"
2024-10-01,2024-10-01,"Wohnbau Nord","DE17100500000123456789","Debit Transfer","Rent October","Main Account",-980.00,,,
2024-10-14,2024-10-13,"CAFÉ RUND",,Presentment,,"Main Account",-15.10,15.10,EUR,1
2024-10-15,2024-10-15,"Main Account",,"Credit Transfer",Round-up,Holiday,0.8,,,
''', [(D(2024, 10, 1), -98000, "EUR", "Wohnbau Nord"), (D(2024, 10, 14), -1510, "EUR", "CAFÉ RUND"), (D(2024, 10, 15), 80, "EUR", "Main Account")],
        {"accounts": ["Main Account", "Holiday"]}),
    "n26_old": ('''"Date","Payee","Account number","Transaction type","Payment reference","Category","Amount (EUR)","Amount (Foreign Currency)","Type Foreign Currency","Exchange Rate"
"2018-09-20","Business Inc.","NL00RABO0123456789","Income","Ping","Miscellaneous","0.01","","",""
"2018-09-21","Stadtwerke","DE17100500000123456789","Direct Debit","Abschlag","Household & Utilities","-60.0","","",""
''', [(D(2018, 9, 20), 1, "EUR", "Business Inc."), (D(2018, 9, 21), -6000, "EUR", "Stadtwerke")], {"accounts": [""]}),
    "revolut": ('''Type,Product,Started Date,Completed Date,Description,Amount,Fee,Currency,State,Balance
TOPUP,Current,2026-09-01 09:00:00,2026-09-01 09:00:05,Payment from Mario Rossi,200.00,0.00,EUR,COMPLETED,250.00
EXCHANGE,Current,2026-09-02 12:00:00,2026-09-02 12:00:01,Exchanged to USD,-100.00,2.00,EUR,COMPLETED,148.00
CARD_PAYMENT,Current,2026-09-18 07:40:00,,Spar,-12.50,0.00,EUR,PENDING,
CARD_PAYMENT,Current,2026-09-19 07:40:00,,Bolt,-2.18,0.00,EUR,REVERTED,
''', [(D(2026, 9, 1), 20000, "EUR", "Payment from Mario Rossi"), (D(2026, 9, 2), -10200, "EUR", "Exchanged to USD")],
        {"accounts": ["Current"], "opening": 5000, "closing": 14800, "aside": ["pending", "not booked"]}),
    "wise": ('''"TransferWise ID",Date,Amount,Currency,Description,"Payment Reference","Running Balance","Exchange From","Exchange To","Exchange Rate","Payer Name","Payee Name","Payee Account Number",Merchant,"Card Last Four Digits","Card Holder Full Name",Attachment,Note,"Total fees","Exchange To Amount"
TRANSFER-456,15-04-2024,-250.00,EUR,"Sent money to Anna Berg",rent,737.50,,,,,"Anna Berg",DE17100500000123456789,,,,,,0.50,
CARD-123,03-04-2024,-12.50,EUR,"Card transaction of 12.50 EUR issued by Albert Heijn AMSTERDAM",,987.50,,,,,,,Albert Heijn,1234,Jan Jansen,,,0.00,
''', [(D(2024, 4, 15), -25000, "EUR", "Anna Berg"), (D(2024, 4, 3), -1250, "EUR", "Albert Heijn")], {"accounts": [""], "opening": 100000, "closing": 73750}),
    "monzo": ('''Transaction ID,Date,Time,Type,Name,Emoji,Category,Amount,Currency,Local amount,Local currency,Notes and #tags,Address,Receipt,Description,Category split,Money Out,Money In
tx_0000AGoDcVlolqzYp9Vh0U,02/03/2022,17:44:34,Faster payment,Acme Ltd,,Income,2100.00,GBP,2100.00,GBP,,,,SALARY,,,2100.00
tx_0000AGoDpgVm98x6eOfP1e,04/03/2022,07:09:51,Card payment,Pret A Manger,☕,Eating out,-3.65,GBP,-3.65,GBP,#coffee,,,PRET LONDON,,-3.65,
''', [(D(2022, 3, 2), 210000, "GBP", "Acme Ltd"), (D(2022, 3, 4), -365, "GBP", "Pret A Manger")], {"accounts": [""]}),
    "starling": ('''Date,Counter Party,Reference,Type,Amount (GBP),Balance (GBP),Spending Category,Notes
01/10/2019,An Employer,SALARY,FASTER PAYMENT,1500.00,5500.00,INCOME,
02/10/2019,Landlord,Rent,FASTER PAYMENT,-1000.00,4500.00,PAYMENTS,
''', [(D(2019, 10, 1), 150000, "GBP", "An Employer"), (D(2019, 10, 2), -100000, "GBP", "Landlord")], {"accounts": [""], "opening": 400000, "closing": 450000}),
    "ing_nl": ('''"Datum";"Naam / Omschrijving";"Rekening";"Tegenrekening";"Code";"Af Bij";"Bedrag (EUR)";"Mutatiesoort";"Mededelingen";"Saldo na mutatie";"Tag"
"20240131";"Vattenfall";"NL20INGB0001234567";"NL02ABNA0123456789";"IC";"Af";"85,50";"Incasso";"Termijn januari";"1200,00";""
"20240125";"Werkgever BV";"NL20INGB0001234567";"NL03RABO0123456789";"OV";"Bij";"1.234,56";"Overschrijving";"Salaris januari";"1285,50";""
''', [(D(2024, 1, 31), -8550, "EUR", "Vattenfall"), (D(2024, 1, 25), 123456, "EUR", "Werkgever BV")],
        {"accounts": ["NL20INGB0001234567"], "opening": 5094, "closing": 120000}),
    "ing_nl_english": ('''"Date","Name / Description","Account","Counterparty","Code","Debit/credit","Amount (EUR)","Transaction type","Notifications","Resulting balance","Tag"
"20240131","Albert Heijn","NL20INGB0001234567","","BA","Debit","12,34","Payment terminal","Groceries","87,66",""
''', [(D(2024, 1, 31), -1234, "EUR", "Albert Heijn")], {"accounts": ["NL20INGB0001234567"], "opening": 10000, "closing": 8766}),
    "ing_de": (ING_DE.encode("cp1252"), [(D(2026, 1, 30), -879, "EUR", "VISA REWE"), (D(2026, 1, 28), 125000, "EUR", "Beispiel AG")],
               {"accounts": ["DE77500105175405324861"], "opening": 20489, "closing": 144610}),
    "dkb": (b"\xef\xbb\xbf" + DKB.encode(), [(D(2025, 3, 28), 100000, "EUR", "Beispiel GmbH"), (D(2025, 3, 27), -1518, "EUR", "Bäckerei Süß")],
            {"accounts": ["DE02120300000000202051"], "closing": 136116, "aside": ["pending"]}),
    "dkb_old": (DKB_OLD.encode("iso-8859-1"), [(D(2019, 3, 29), -104999, "EUR", "Stadtwerke Düren")], {"accounts": ["DE02120300000000202051"], "closing": 500001}),
    "sparkasse": (SPARKASSE.encode("iso-8859-1"), [(D(2026, 4, 24), -8990, "EUR", "Stadtwerke Müllheim"), (D(2026, 4, 23), 114341, "EUR", "Beispiel Handel GmbH")],
                  {"accounts": ["DE02120300000000202051"], "aside": ["pending"]}),
    "volksbank": (b"\xef\xbb\xbf" + VOLKSBANK.encode(), [(D(2025, 3, 4), -1240, "EUR", "Hofladen Öhler"), (D(2025, 3, 3), 295068, "EUR", "Beispiel AG")],
                  {"accounts": ["DE02120300000000202051"], "opening": 0, "closing": 293828}),
    "comdirect": (COMDIRECT.encode("cp1252"), [(D(2025, 10, 27), -3456, "EUR", "Netflix International B.V."), (D(2025, 10, 24), -500000, "EUR", "Thomas Müller")],
                  {"accounts": [""], "opening": 620000, "closing": 116544, "aside": ["pending"]}),
    "commerzbank": ('''Buchungstag;Wertstellung;Umsatzart;Buchungstext;Betrag;Währung;IBAN Kontoinhaber;Kategorie
03.03.2025;03.03.2025;Lastschrift;Stadtwerke Köln Abschlag End-to-End-Ref.: 12;-2040;EUR;DE02120300000000202051;Wohnen
04.03.2025;04.03.2025;Lastschrift;Kiosk;-3,9;EUR;DE02120300000000202051;
''', [(D(2025, 3, 3), -204000, "EUR", "Stadtwerke Köln Abschlag End-to-End-Ref.: 12"), (D(2025, 3, 4), -390, "EUR", "Kiosk")], {"accounts": ["DE02120300000000202051"]}),
    "deutsche_bank": ('''Umsätze Girokonto;;;;Kundennummer: 100 1234567 00
01.03.2025 - 31.03.2025
Alter Kontostand;;;;1.250,00;EUR
Buchungstag;Wert;Umsatzart;Begünstigter / Auftraggeber;Verwendungszweck;IBAN / Kontonummer;BIC;Kundenreferenz;Mandatsreferenz;Gläubiger ID;Fremde Gebühren;Betrag;Abweichender Empfänger;Anzahl der Aufträge;Anzahl der Schecks;Soll;Haben;Währung
3.3.2025;3.3.2025;SEPA-Lastschrift;Wohnbau Nord;Miete;DE17100500000123456789;BELADEBEXXX;;;;;-1.000,00;;;;-1.000,00;;EUR
28.3.2025;28.3.2025;SEPA-Überweisung;Beispiel AG;Lohn;DE17100500000123456789;BELADEBEXXX;;;;;750;;;;;750;EUR
''', [(D(2025, 3, 3), -100000, "EUR", "Wohnbau Nord"), (D(2025, 3, 28), 75000, "EUR", "Beispiel AG")], {"accounts": [""]}),
    "rabobank": ('''"IBAN/BBAN","Munt","BIC","Volgnr","Datum","Rentedatum","Bedrag","Saldo na trn","Tegenrekening IBAN/BBAN","Naam tegenpartij","Naam uiteindelijke partij","Naam initiërende partij","BIC tegenpartij","Code","Batch ID","Transactiereferentie","Machtigingskenmerk","Incassant ID","Betalingskenmerk","Omschrijving-1","Omschrijving-2","Omschrijving-3","Reden retour","Oorspr bedrag","Oorspr munt","Koers"
"NL44RABO0123456789","EUR","RABONL2U","000000000000001234","2024-01-31","2024-01-31","-45,00","+955,00","NL06INGB0007654321","KPN B.V.","","","INGBNL2A","ei","","","M123","NL00ZZZ","","Factuur 123","Mobiel abonnement","","","","",""
"NL44RABO0123456789","EUR","RABONL2U","000000000000001235","2024-02-01","2024-02-01","+2500,00","+3455,00","NL03RABO0123456789","Werkgever","","","RABONL2U","cb","","","","","","Salaris"," ","","","","",""
'''.encode("cp1252"), [(D(2024, 1, 31), -4500, "EUR", "KPN B.V."), (D(2024, 2, 1), 250000, "EUR", "Werkgever")],
        {"accounts": ["NL44RABO0123456789"], "opening": 100000, "closing": 345500}),
    "amex": ('''Date,Description,Card Member,Account #,Amount,Extended Details,Reference,Category
01/25/2026,WHOLEFDS 10234,A SAMPLE,-61009,45.10,"",'320260250001',Merchandise & Supplies-Groceries
01/20/2026,AUTOPAY PAYMENT - THANK YOU,A SAMPLE,-61009,-200.00,"",'320260200002',
''', [(D(2026, 1, 25), -4510, "XXX", "WHOLEFDS 10234"), (D(2026, 1, 20), 20000, "XXX", "AUTOPAY PAYMENT - THANK YOU")], {"accounts": ["-61009"], "warnings": ["unknown currency"]}),
    "bunq": ('''"Datum","Bedrag","Rekening","Tegenrekening","Naam","Omschrijving"
"2018-03-01","-2,56","NL47BUNQ2025181418","NL89BUNQ2025105584","bunq","invoice 410408"
"2018-03-09","750,00","NL47BUNQ2025181418","NL77RABO0311467415","W. Jansen","Naar bunq"
''', [(D(2018, 3, 1), -256, "EUR", "bunq"), (D(2018, 3, 9), 75000, "EUR", "W. Jansen")], {"accounts": ["NL47BUNQ2025181418"]}),
    "chase": ('''Details,Posting Date,Description,Amount,Type,Balance,Check or Slip #
CREDIT,09/15/2026,"EXAMPLE PAYROLL",1000.00,ACH_CREDIT,1324.17,,
DEBIT,09/07/2026,"ATM WITHDRAWAL                       009775  09/07233 3RD A",-100.00,ATM,324.17,,
''', [(D(2026, 9, 15), 100000, "USD", "EXAMPLE PAYROLL"), (D(2026, 9, 7), -10000, "USD", "ATM WITHDRAWAL 009775 09/07233 3RD A")],
        {"accounts": [""], "opening": 42417, "closing": 132417}),
    "chase_card": ('''Transaction Date,Post Date,Description,Category,Type,Amount,Memo
08/10/2026,08/11/2026,AMAZON MKTPL*5H1YV8C82,Shopping,Sale,-10.59,
08/06/2026,08/07/2026,Payment Thank You-Mobile,,Payment,481.20,
''', [(D(2026, 8, 11), -1059, "USD", "AMAZON MKTPL*5H1YV8C82"), (D(2026, 8, 7), 48120, "USD", "Payment Thank You-Mobile")], {"accounts": [""]}),
    "bank_of_america": (BOFA, [(D(2026, 4, 2), -4500, "USD", "WHOLE FOODS #123 AUSTIN TX"), (D(2026, 4, 13), 250000, "USD", "ACME INC DES:PAYROLL")],
                        {"accounts": [""], "opening": 100000, "closing": 345500}),
    "capital_one": ('''Transaction Date,Posted Date,Card No.,Description,Category,Debit,Credit
2018-08-25,2018-08-27,8772,LA FITNESS,Entertainment,31.85,
2018-08-19,2018-08-20,8772,CAPITAL ONE MOBILE PYMT,Payment/Credit,,200.00
''', [(D(2018, 8, 27), -3185, "USD", "LA FITNESS"), (D(2018, 8, 20), 20000, "USD", "CAPITAL ONE MOBILE PYMT")], {"accounts": ["8772"]}),
    "citi": ('''Status,Date,Description,Debit,Credit
Pending,08/12/2024,GAS,20.00,
Cleared,08/02/2024,COSTCO WHSE #1234 CHICAGO IL,156.78,
Cleared,08/04/2024,AUTOPAY PAYMENT THANK YOU,,-500.00
''', [(D(2024, 8, 2), -15678, "USD", "COSTCO WHSE #1234 CHICAGO IL"), (D(2024, 8, 4), 50000, "USD", "AUTOPAY PAYMENT THANK YOU")], {"accounts": [""], "aside": ["pending"]}),
    "discover": ('''Trans. Date,Post Date,Description,Amount,Category
10/15/2025,10/15/2025,"SACRAMENTO MUNICIPAL",127.52,Services
09/27/2025,09/27/2025,"INTERNET PAYMENT - THANK YOU",-180.00,Payments and Credits
''', [(D(2025, 10, 15), -12752, "USD", "SACRAMENTO MUNICIPAL"), (D(2025, 9, 27), 18000, "USD", "INTERNET PAYMENT - THANK YOU")], {"accounts": [""]}),
    "lloyds": ('''Transaction Date,Transaction Type,Sort Code,Account Number,Transaction Description,Debit Amount,Credit Amount,Balance
12/12/2025,FPO,'30-96-26,50847768,8X8 UK LIMITED,254.08,,31041.29
11/12/2025,FPI,'30-96-26,50847768,ORION RIDGE,,26000.00,31295.37
''', [(D(2025, 12, 12), -25408, "GBP", "8X8 UK LIMITED"), (D(2025, 12, 11), 2600000, "GBP", "ORION RIDGE")], {"accounts": ["50847768"], "opening": 529537, "closing": 3104129}),
    "barclays": ('''Number,Date,Account,Amount,Subcategory,Memo
,03/08/2026,20-00-00 12345678,-10.99,PAYMENT,NETFLIX.COM         ON 02 AUG          BCC
,15/07/2026,20-00-00 12345678,2450.00,DIRECTDEP,ACME LTD SALARY
''', [(D(2026, 8, 3), -1099, "GBP", "NETFLIX.COM ON 02 AUG BCC"), (D(2026, 7, 15), 245000, "GBP", "ACME LTD SALARY")], {"accounts": ["20-00-00 12345678"]}),
    "natwest": ('''Date,Type,Description,Value,Balance,Account Name,Account Number
12 Apr 2026,POS,"1234 11APR26 , TFL TRAVEL , LONDON GB",-3.50,96.50,Current,600000-12345678
11 Apr 2026,BAC,"ACME LTD , SALARY",50.00,100.00,Current,600000-12345678
Balance as at 13 Apr 2026,,,,96.50,Current,600000-12345678
''', [(D(2026, 4, 12), -350, "GBP", "1234 11APR26 , TFL TRAVEL , LONDON GB"), (D(2026, 4, 11), 5000, "GBP", "ACME LTD , SALARY")],
        {"accounts": ["600000-12345678"], "opening": 5000, "closing": 9650}),
    "paypal": (PAYPAL, [(D(2023, 1, 13), 120660, "USD", "Jana Small"), (D(2023, 1, 14), -1999, "USD", "Book Shop")], {"accounts": [""], "aside": ["not booked"]}),
    "mint": ('''"Date","Description","Original Description","Amount","Transaction Type","Category","Account Name","Labels","Notes"
"8/10/2016","Starbucks","STARBUCKS STORE 12345","2.45","debit","Coffee Shops","My Credit Card","",""
"8/11/2016","Paycheck","ACME CORP PAYROLL","2000.00","credit","Paycheck","Checking","",""
''', [(D(2016, 8, 10), -245, "USD", "Starbucks"), (D(2016, 8, 11), 200000, "USD", "Paycheck")], {"accounts": ["My Credit Card", "Checking"]}),
    "ynab": ('''"Account","Flag","Date","Payee","Category Group/Category","Category Group","Category","Memo","Outflow","Inflow","Cleared"
"Checking","","31.01.2026","Acme Bank","Monthly Bills: Bank Fees","Monthly Bills","Bank Fees","",€2.00,€0.00,"Cleared"
"Checking","","05.01.2026","Employer","Inflow: Ready to Assign","Inflow","Ready to Assign","",€0.00,€3000.00,"Cleared"
''', [(D(2026, 1, 31), -200, "EUR", "Acme Bank"), (D(2026, 1, 5), 300000, "EUR", "Employer")], {"accounts": ["Checking"]}),
}
